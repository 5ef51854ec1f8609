"""One step of an optimizer, with the options of a recipe: how `loop` trains.

The step in the open, without options, is in `03_retrain.ipynb`.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.errors import InputError, UnavailableError
from helpers.machine import device
from helpers.metrics import predictions
from helpers.sparsity.hold import hold_masks
from helpers.sparsity.prune import Masks
from helpers.training.distributed import Processes, average_buffers_
from helpers.training.recipe import Recipe, schedule

_AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Step:
    """The model, the optimizer and everything else that a step changes.

    Calling it with images and labels of one batch trains the model for one step.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        steps_per_epoch: int,
        masks: Masks,
        together: Processes,
        teacher: nn.Module | None = None,
    ) -> None:
        """Prepare the training of a model, in place.

        Args:
            model: on the device, in the layout of the recipe.
            recipe: the procedure.
            steps_per_epoch: batches in an epoch.
            masks: weights to hold at zero.
            together: the processes that train this model, each with its share of a batch.
            teacher: on the device, in evaluation mode; for `recipe.distillation`.

        Raises:
            InputError: the recipe distils and there is no teacher.
            UnavailableError: the recipe needs GPUs and there are none.
        """
        if recipe.distillation and teacher is None:
            raise InputError(
                f"distillation is {recipe.distillation} and there is no teacher. Give the dense "
                "model that the pruned one should learn from, or set distillation to 0."
            )
        self.where = device()
        if recipe.sync_batch_norm and self.where.type != "cuda":
            raise UnavailableError(
                "sync_batch_norm needs GPUs: PyTorch has no such batch norm on a CPU."
            )
        if recipe.sync_batch_norm and together.count > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.recipe, self.together, self.teacher = recipe, together, teacher
        self.model = model
        self.parallel = None
        if together.count > 1:
            self.parallel = _parallel(model)
        self.forward = self.parallel or model
        if recipe.compile:
            self.forward = torch.compile(self.forward)  # type: ignore[assignment]  # still a module
        self.optimizer = SGD(
            model.parameters(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.scheduler = LambdaLR(self.optimizer, schedule(recipe, steps_per_epoch))
        self.scaler = torch.amp.GradScaler(self.where.type, enabled=recipe.amp == "fp16")
        self.average = None
        if recipe.ema_decay is not None:
            average = get_ema_multi_avg_fn(recipe.ema_decay)
            self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        if masks:
            hold_masks(self.optimizer, model, masks)  # ends with the optimizer

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts: the averaged one, if the recipe averages."""
        return self.model if self.average is None else self.average.module

    def __call__(self, images: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """Train for one step.

        Args:
            images: this process's share of a batch, on any device.
            labels: its classes.
            batch_size: of the whole batch, over all processes.

        Returns:
            This process's part of the mean loss of the batch, times the number of processes, and
            the number of its images that were classified correctly; on the device.
        """
        images = images.to(self.where, memory_format=self._layout(), non_blocking=True)
        labels = labels.to(self.where, non_blocking=True)
        loss = torch.zeros((), device=self.where)
        right = torch.zeros((), dtype=torch.int64, device=self.where)
        parts = list(
            zip(
                images.tensor_split(self.recipe.accumulation),
                labels.tensor_split(self.recipe.accumulation),
                strict=True,
            )
        )
        self.optimizer.zero_grad()
        for number, (part, answers) in enumerate(parts, 1):
            # Each image counts as much as any other of the batch, whichever process has it: the
            # gradients of the parts are added up, those of the processes averaged.
            weight = len(answers) * self.together.count / batch_size
            with self._exchange(last=number == len(parts)):
                logits, part_loss = self._forward(part, answers)
                part_loss = part_loss * weight
                self.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
            right += (predictions(logits.detach()) == answers).sum()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss, right

    def end_epoch(self) -> None:
        """Agree with the other processes on the statistics of batch norms."""
        average_buffers_(self.model, self.together)
        if self.average is not None:
            average_buffers_(self.average, self.together)

    def state(self) -> dict[str, dict]:
        """Return everything that changes, to continue from later."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
        }

    def load(self, state: dict[str, dict]) -> None:
        """Continue from what `state` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.recipe.channels_last else torch.preserve_format

    def _exchange(self, last: bool) -> AbstractContextManager:
        """Return a context in which the processes add up gradients only after the last part."""
        if self.parallel is None or last:
            return nullcontext()
        return self.parallel.no_sync()

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and mean loss."""
        recipe = self.recipe
        amp = _AMP_TYPES.get(recipe.amp or "")
        with torch.autocast(self.where.type, amp, enabled=amp is not None):
            logits = self.forward(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            if not recipe.distillation or self.teacher is None:
                return logits, loss
            with torch.no_grad():
                wanted = self.teacher(images)
        # Hinton, Vinyals and Dean, arXiv 1503.02531: the factor keeps the gradients' size.
        temperature = recipe.temperature
        distance = temperature**2 * F.kl_div(
            F.log_softmax(logits.float() / temperature, 1),
            F.log_softmax(wanted.float() / temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        return logits, (1 - recipe.distillation) * loss + recipe.distillation * distance


def _parallel(model: nn.Module) -> DistributedDataParallel:
    """Return a model that averages its gradients over the processes.

    The statistics of batch norms are averaged after an epoch, not sent in every step. The argument
    that says so has a new name since PyTorch 2.14, which warns of the old one.
    """
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
        return DistributedDataParallel(model, forward_sync_buffers=False)
    return DistributedDataParallel(model, broadcast_buffers=False)
