"""The networks of `networks.py`: how to make each with random weights, and what to call it with.

Nothing is downloaded. Each is the smallest of its family, cut down further where its
constructor allows it, so that all of them together take an hour and not a day.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...]  # positional; tensors and other values
Made = tuple[nn.Module, Inputs]

BATCH, TOKENS, VOCABULARY = 2, 16, 256


@dataclass(frozen=True)
class Network:
    """A network of a library; `make` imports the library when it is called."""

    library: str
    name: str
    make: Callable[[], Made]

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"


def images(size: int, channels: int = 3, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, channels, size, size)


def tokens(length: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length))


# --- timm: the size of the images, and arguments that make a network smaller ---

# Two blocks of a vision transformer, and two or more stages of one that has stages.
_VIT = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 4}
_SHALLOW = {"depths": (1, 1, 1, 1)}

TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (64, _VIT),
    "cait_xxs24_224": (64, {"img_size": 64, "embed_dim": 48, "depth": 2}),
    "coat_lite_tiny": (224, {}),
    "convit_tiny": (64, {"img_size": 64, "depth": 2, "local_up_to_layer": 1}),
    "convnext_zepto_rms": (64, {}),
    "convnextv2_atto": (64, _SHALLOW),
    "crossvit_tiny_240": (240, {"depth": ((1, 2, 0), (1, 2, 0))}),
    "cs3darknet_focus_s": (64, {}),
    "cspnext_tiny": (64, {}),
    "davit_tiny": (64, {"embed_dims": (32, 64), "num_heads": (2, 4), "depths": (1, 1)}),
    "deit_tiny_distilled_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "densenet121": (64, {"block_config": (2, 2, 2, 2)}),
    "dla46_c": (64, {}),
    "eca_botnext26ts_256": (256, {}),
    "edgenext_xx_small": (64, {}),
    "efficientformerv2_s0": (224, {}),
    "efficientnet_b0": (64, {}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (224, {}),
    "ese_vovnet19b_slim_dw": (64, {}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 2}),
    "fasternet_t0": (64, {}),
    "fastvit_t8": (64, {}),
    "gernet_s": (64, {}),
    "ghostnet_050": (64, {}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
    "halonet26t": (256, {}),
    "hgnetv2_b0": (64, {}),
    "hiera_tiny_224": (224, {"embed_dim": 32, "stages": (1, 1, 1, 1)}),
    "inception_next_atto": (64, {}),
    "lambda_resnet26rpt_256": (256, {}),
    "lcnet_035": (64, {}),
    "levit_128s": (224, {}),
    "test_mambaout": (64, {}),
    "test_maxvit": (160, {}),
    "mobilenetv2_050": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv4_conv_small_050": (64, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "nf_regnet_b0": (64, {}),
    "test_nfnet": (64, {}),
    "pit_ti_224": (224, {}),
    "pvt_v2_b0": (64, {}),
    "rdnet_tiny": (64, {"num_blocks_list": (1, 1, 1, 1, 1, 1, 1)}),
    "regnety_002": (64, {}),
    "repghostnet_050": (64, {}),
    "repvit_m0_9": (64, {}),
    "res2net50_14w_8s": (64, {"layers": (1, 1, 1, 1)}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "resnest14d": (64, {}),
    "resnet18": (64, {}),
    "resnetv2_18d": (64, {}),
    "rexnet_100": (64, {}),
    "samvit_base_patch16_224": (64, {**_VIT, "global_attn_indexes": (1,), "window_size": 2}),
    "sequencer2d_s": (224, {"layers": (1, 1, 1, 1), "embed_dims": (48, 96, 96, 96)}),
    "shvit_s1": (64, {}),
    "starnet_s050": (64, {}),
    "swiftformer_xs": (64, {}),
    "swin_tiny_patch4_window7_224": (
        56,
        {"img_size": 56, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2)},
    ),
    "swinv2_cr_tiny_ns_224": (224, {"embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2)}),
    "swinv2_tiny_window8_256": (
        64,
        {"img_size": 64, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2)},
    ),
    "tiny_vit_5m_224": (
        64,
        {"embed_dims": (32, 64, 64, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
    ),
    "tnt_s_patch16_224": (64, {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads_outer": 4}),
    "twins_svt_small": (
        224,
        {"embed_dims": (32, 32, 64, 64), "num_heads": (1, 1, 2, 2), "depths": (1, 2, 2, 1)},
    ),
    "vgg11": (32, {"mlp_ratio": 1 / 16}),
    "vit_tiny_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "vit_tiny_r_s16_p8_224": (64, {"img_size": 64, "depth": 2}),
    "vit_relpos_small_patch16_224": (64, _VIT),
    "vitamin_small_224": (64, {"img_size": 64, "depth": 2}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64, "depth": 2}),
}


def _timm(name: str) -> Callable[[], Made]:
    def make() -> Made:
        import timm

        size, options = TIMM[name]
        model = timm.create_model(name, pretrained=False, num_classes=16, **options)
        return model, (images(size),)

    return make


# --- transformers: a class of model, what its configuration gets, and the inputs ---

_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "use_cache": False}  # fmt: skip
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 4, "intermediate_size": 128}  # fmt: skip
_GPT = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4,
        "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2,
       "num_heads": 4, "decoder_start_token_id": 0, "use_cache": False}  # fmt: skip
_BART = {"vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128,
         "decoder_ffn_dim": 128, "max_position_embeddings": 64, "use_cache": False,
         "decoder_start_token_id": 2}  # fmt: skip
_SPEECH = {
    "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "conv_dim": (32, 32, 32), "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False,
}  # fmt: skip
_DETECTOR = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128,
             "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
             "num_queries": 10, "num_labels": 8}  # fmt: skip
_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [32, 32, 64, 64]}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2],
         "num_heads": [1, 2], "window_size": 4}  # fmt: skip


def _ids() -> Inputs:
    return (tokens(),)


def _ids_and_decoder_ids() -> Inputs:
    return tokens(), None, tokens(8)


def _pixels() -> Inputs:
    return (images(32),)


def _large_pixels() -> Inputs:
    return (images(64),)


def _waves() -> Inputs:
    return (torch.randn(BATCH, 800),)


def _whisper() -> Inputs:
    return torch.randn(BATCH, 16, 64), None, tokens(8)


def _clip() -> Inputs:
    return tokens(), images(32)


def _series() -> Inputs:
    return (torch.randn(BATCH, 32, 4),)


TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Callable[[], Inputs]]] = {
    "albert": ("AlbertForMaskedLM", {**_TEXT, "embedding_size": 32}, _ids),
    "bart": ("BartForConditionalGeneration", _BART, _ids_and_decoder_ids),
    "beit": (
        "BeitForImageClassification",
        {**_VISION, "use_relative_position_bias": True},
        _pixels,
    ),
    "bert": ("BertForMaskedLM", _TEXT, _ids),
    "bloom": (
        "BloomForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "n_layer": 2,
            "n_head": 4,
            "use_cache": False,
        },
        _ids,
    ),
    "clip": (
        "CLIPModel",
        {
            "text_config": {**_TEXT, "eos_token_id": 2},
            "vision_config": _VISION,
            "projection_dim": 32,
        },
        _clip,
    ),
    "codegen": ("CodeGenForCausalLM", {**_GPT, "n_ctx": 64, "rotary_dim": 8}, _ids),
    "cohere": ("CohereForCausalLM", _GROUPED, _ids),
    "convnextv2": ("ConvNextV2ForImageClassification", _STAGES, _large_pixels),
    "deberta": (
        "DebertaForMaskedLM",
        {**_TEXT, "relative_attention": True, "pos_att_type": "p2c|c2p"},
        _ids,
    ),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        {
            **_TEXT,
            "relative_attention": True,
            "position_buckets": 16,
            "pos_att_type": "p2c|c2p",
            "conv_kernel_size": 3,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
        _ids,
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {
            **_EXPERTS,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
        },
        _ids,
    ),
    "detr": ("DetrForObjectDetection", _DETECTOR, _large_pixels),
    "dinov2": ("Dinov2ForImageClassification", _VISION, _pixels),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 128,
            "max_position_embeddings": 64,
        },
        _ids,
    ),
    "electra": ("ElectraForPreTraining", {**_TEXT, "embedding_size": 32}, _ids),
    "falcon": (
        "FalconForCausalLM",
        {**_TEXT, "use_cache": False, "new_decoder_architecture": True, "num_kv_heads": 2},
        _ids,
    ),
    "fnet": ("FNetForMaskedLM", _TEXT, _ids),
    "gemma": ("GemmaForCausalLM", {**_GROUPED, "head_dim": 16}, _ids),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16},
        _ids,
    ),
    "gpt2": ("GPT2LMHeadModel", _GPT, _ids),
    "gpt-neox": ("GPTNeoXForCausalLM", {**_TEXT, "use_cache": False}, _ids),
    "gpt-oss": (
        "GptOssForCausalLM",
        {
            **_EXPERTS,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        _ids,
    ),
    "gptj": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 8}, _ids),
    "granitemoe": ("GraniteMoeForCausalLM", _EXPERTS, _ids),
    "hubert": ("HubertForCTC", _SPEECH, _waves),
    "llama": ("LlamaForCausalLM", _GROUPED, _ids),
    "mamba": (
        "MambaForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "state_size": 8,
            "num_hidden_layers": 2,
            "use_cache": False,
            "use_mambapy": False,
        },
        _ids,
    ),
    "mistral": ("MistralForCausalLM", {**_GROUPED, "sliding_window": 8}, _ids),
    "mixtral": ("MixtralForCausalLM", _EXPERTS, _ids),
    "mobilevit": (
        "MobileViTForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64],
        },
        _large_pixels,
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        {
            **_TEXT,
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        _ids,
    ),
    "mpnet": ("MPNetForMaskedLM", _TEXT, _ids),
    "olmoe": ("OlmoeForCausalLM", _EXPERTS, _ids),
    "opt": (
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 64,
            "use_cache": False,
        },
        _ids,
    ),
    "patchtst": (
        "PatchTSTForPrediction",
        {
            "num_input_channels": 4,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "prediction_length": 8,
        },
        _series,
    ),
    "phi": ("PhiForCausalLM", {**_GROUPED, "num_key_value_heads": 4}, _ids),
    "phi3": ("Phi3ForCausalLM", _GROUPED, _ids),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED, _ids),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        {**_EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
        _ids,
    ),
    "qwen3": ("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}, _ids),
    "roberta": ("RobertaForSequenceClassification", {**_TEXT, "max_position_embeddings": 66}, _ids),
    "rwkv": (
        "RwkvForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "attention_hidden_size": 64,
            "intermediate_size": 128,
            "context_length": 64,
            "use_cache": False,
        },
        _ids,
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {
            **_STAGES,
            "decoder_hidden_size": 64,
            "num_attention_heads": [1, 1, 2, 2],
            "num_labels": 8,
        },
        _large_pixels,
    ),
    "siglip": ("SiglipModel", {"text_config": _TEXT, "vision_config": _VISION}, _clip),
    "squeezebert": ("SqueezeBertForMaskedLM", {**_TEXT, "embedding_size": 64}, _ids),
    "swin": ("SwinForImageClassification", _SWIN, _pixels),
    "swinv2": ("Swinv2ForImageClassification", _SWIN, _pixels),
    "switch-transformers": (
        "SwitchTransformersForConditionalGeneration",
        {
            **_T5,
            "num_experts": 4,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
        _ids_and_decoder_ids,
    ),
    "t5": ("T5ForConditionalGeneration", _T5, _ids_and_decoder_ids),
    "vit": ("ViTForImageClassification", _VISION, _pixels),
    "wav2vec2": ("Wav2Vec2ForCTC", _SPEECH, _waves),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **_BART,
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _whisper,
    ),
    "xlm-roberta-xl": ("XLMRobertaXLForMaskedLM", {**_TEXT, "max_position_embeddings": 66}, _ids),
    "xlnet": (
        "XLNetLMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "n_layer": 2,
            "n_head": 4,
            "d_inner": 128,
            "use_mems_eval": False,
        },
        _ids,
    ),
}


def _transformers(name: str) -> Callable[[], Made]:
    def make() -> Made:
        os.environ["HF_HUB_OFFLINE"] = "1"  # a mistake must not end in a download
        import transformers

        class_name, options, inputs = TRANSFORMERS[name]
        kind = getattr(transformers, class_name)
        if name == "detr":
            backbone = transformers.ResNetConfig(
                embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic",
                out_features=["stage2"],
            )  # fmt: skip
            options = {**options, "backbone_config": backbone, "use_timm_backbone": False}
        return kind(kind.config_class(**options)), inputs()

    return make


# --- ultralytics: the files of its package ---

ULTRALYTICS = (
    "yolov3-tiny.yaml", "yolov5n.yaml", "yolov8n.yaml", "yolov8n-cls.yaml", "yolov8n-pose.yaml",
    "yolov9t.yaml", "yolov10n.yaml", "yolo11n.yaml", "yolo11n-seg.yaml", "yolo12n.yaml",
    "yolo26n.yaml",
)  # fmt: skip


def _ultralytics(name: str) -> Callable[[], Made]:
    def make() -> Made:
        from ultralytics.nn import tasks

        kinds = {
            "-cls": tasks.ClassificationModel, "-pose": tasks.PoseModel,
            "-seg": tasks.SegmentationModel,
        }  # fmt: skip
        kind = next((kinds[end] for end in kinds if end in name), tasks.DetectionModel)
        return kind(name, verbose=False), (images(64),)

    return make


# --- diffusers ---


def _unet_2d() -> Made:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, (images(16), torch.tensor(10))


def _unet_2d_condition() -> Made:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32,
        attention_head_dim=8,
    )  # fmt: skip
    return model, (images(16, 4), torch.tensor(10), torch.randn(BATCH, 8, 32))


def _autoencoder_kl() -> Made:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip
    return model, (images(32),)


def _dit() -> Made:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=16, patch_size=2, num_embeds_ada_norm=100, norm_num_groups=8,
    )  # fmt: skip
    return model, (images(16, 4), torch.tensor([10, 20]), torch.tensor([1, 2]))


def _sd3() -> Made:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=64, pooled_projection_dim=64, pos_embed_max_size=16,
    )  # fmt: skip
    text, pooled = torch.randn(BATCH, 8, 32), torch.randn(BATCH, 64)
    return model, (images(16, 4), text, pooled, torch.tensor([10, 20]))


DIFFUSERS = {
    "UNet2DModel": _unet_2d,
    "UNet2DConditionModel": _unet_2d_condition,
    "AutoencoderKL": _autoencoder_kl,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
}


# --- segmentation_models_pytorch ---

SMP = {
    "Unet": "resnet18", "UnetPlusPlus": "mobilenet_v2", "MAnet": "resnet18",
    "Linknet": "resnet18", "FPN": "efficientnet-b0", "PSPNet": "resnet18", "PAN": "resnet18",
    "DeepLabV3Plus": "mobilenet_v2", "UPerNet": "resnet18", "Segformer": "mit_b0",
}  # fmt: skip


def _smp(name: str) -> Callable[[], Made]:
    def make() -> Made:
        import segmentation_models_pytorch

        kind = getattr(segmentation_models_pytorch, name)
        model = kind(encoder_name=SMP[name], encoder_weights=None, classes=4)
        return model, (images(128 if name == "PAN" else 64),)

    return make


# --- torchvision: two that the project's own environment can run ---


def _torchvision(name: str) -> Callable[[], Made]:
    def make() -> Made:
        import torchvision

        return torchvision.models.get_model(name, weights=None), (images(32),)

    return make


TORCHVISION = ("shufflenet_v2_x0_5", "squeezenet1_1")


def catalogue() -> list[Network]:
    """Return all networks, in the order in which they are tried."""
    return [
        *(Network("torchvision", name, _torchvision(name)) for name in TORCHVISION),
        *(Network("timm", name, _timm(name)) for name in TIMM),
        *(Network("transformers", name, _transformers(name)) for name in TRANSFORMERS),
        *(Network("ultralytics", name, _ultralytics(name)) for name in ULTRALYTICS),
        *(Network("diffusers", name, make) for name, make in DIFFUSERS.items()),
        *(Network("segmentation_models_pytorch", name, _smp(name)) for name in SMP),
    ]
