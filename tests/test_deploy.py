"""The files of docs/deploy/ against the schemas of Kubernetes, KServe and KEDA, and each other.

The schemas come in packages that are too large to be part of this project: 260 MB. Where
`docs/deploy/requirements.txt` is not installed, the tests that need them are skipped.
"""

import re
import subprocess
from typing import Any

import pytest
import typer.main
import yaml

from helpers.serving import triton_binary
from helpers.tutorial import commands
from helpers.tutorial.settings import project_root

FOLDER = project_root() / "docs" / "deploy"
PAGE = (project_root() / "docs" / "deploy.md").read_text()


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


BY_KIND = {each["kind"]: each for name in ("kubernetes.yaml", "autoscale.yaml", "kserve.yaml")
           for each in documents(name)}  # fmt: skip
DEPLOYMENT = BY_KIND["Deployment"]
(CONTAINER,) = DEPLOYMENT["spec"]["template"]["spec"]["containers"]
SERVICE, SCALER, KSERVE = (
    BY_KIND[kind] for kind in ("Service", "ScaledObject", "InferenceService")
)


# --- against the schemas ---


@pytest.mark.parametrize("kind", ["Deployment", "Service", "NetworkPolicy"])
def test_kubernetes_accepts_the_manifest(kind):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(BY_KIND[kind], "1.37", strict=True)


def test_a_manifest_that_kubernetes_does_not_accept_is_found():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    wrong = {**SERVICE, "spec": {**SERVICE["spec"], "portz": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_keda_knows_every_field():
    """Its classes ignore fields that they do not know, so nothing may be lost in them."""
    models = pytest.importorskip("cloudcoil.models.keda.v1alpha1")
    known = models.ScaledObject.model_validate(SCALER)
    assert known.model_dump(by_alias=True, exclude_unset=True, mode="json") == SCALER


def unknown_fields(value: Any, kind: str, where: str) -> list[str]:
    """Return the fields of a value that KServe's and Kubernetes' own classes lack."""
    import kserve.models
    import kubernetes.client.models

    if of := re.fullmatch(r"(?i:list)\[(.+)\]", kind):
        assert isinstance(value, list), where
        return [bad for each in value for bad in unknown_fields(each, of[1], f"{where}[]")]
    if of := re.fullmatch(r"(?i:dict)[(\[]str, (.+)[)\]]", kind):
        assert isinstance(value, dict), where
        return [
            bad
            for key, each in value.items()
            for bad in unknown_fields(each, of[1], f"{where}.{key}")
        ]
    model = getattr(kserve.models, kind, None)
    if model is None and re.match(r"V\d", kind):
        model = getattr(kubernetes.client.models, kind, None)
    if model is None:
        plain = {"str": str, "int": int, "bool": bool}.get(kind, str | int | float)
        return [] if isinstance(value, plain) else [f"{where} is no {kind}"]
    names = {key: name for name, key in model.attribute_map.items()}
    found = [f"{where}.{key}" for key in value.keys() - names.keys()]
    for key in value.keys() & names.keys():
        found += unknown_fields(value[key], model.openapi_types[names[key]], f"{where}.{key}")
    return found


def test_kserve_knows_every_field():
    pytest.importorskip("kserve")
    assert unknown_fields(KSERVE, "V1beta1InferenceService", "InferenceService") == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"minReplica": 1}, ["spec.predictor.minReplica"]),
        ({"minReplicas": "1"}, ["spec.predictor.minReplicas is no int"]),
        ({"model": {"runtimes": "x"}}, ["spec.predictor.model.runtimes"]),
        (
            {"autoScaling": {"metrics": [{"kind": 1}]}},
            ["spec.predictor.autoScaling.metrics[].kind"],
        ),
    ],
)
def test_a_field_that_kserve_does_not_know_is_found(change, found):
    pytest.importorskip("kserve")
    wrong = {"spec": {"predictor": change}}
    problems = unknown_fields(wrong, "V1beta1InferenceService", "")
    assert problems == [f".{each}" for each in found]


# --- against each other, and against what this project writes ---


def test_all_name_the_same_release_of_the_image():
    image = CONTAINER["image"]
    assert KSERVE["spec"]["predictor"]["model"]["image"] == image
    dockerfile = (FOLDER / "Dockerfile").read_text()
    assert f"--tag {image} " in dockerfile
    releases = set(re.findall(r":(\d\d\.\d\d-py3)\b", PAGE + dockerfile))
    assert releases == {image.rpartition(":")[2]}


def test_the_service_leads_to_the_pods_and_their_ports():
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert SERVICE["spec"]["selector"] == labels
    assert BY_KIND["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    ports = {each["name"]: each["containerPort"] for each in CONTAINER["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for each in SERVICE["spec"]["ports"]:
        assert ports[each["targetPort"]] == each["port"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["httpGet"]["port"] in ports


def test_the_metrics_are_not_for_every_pod_that_may_ask_for_answers():
    clients, prometheus = BY_KIND["NetworkPolicy"]["spec"]["ingress"]
    assert [each["port"] for each in clients["ports"]] == [8000, 8001]
    assert [each["port"] for each in prometheus["ports"]] == [8002]


def test_the_pod_has_no_more_rights_than_it_needs():
    pod = DEPLOYMENT["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    assert not CONTAINER["securityContext"]["allowPrivilegeEscalation"]
    assert CONTAINER["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {each["name"]: each for each in CONTAINER["volumeMounts"]}
    assert mounts["models"]["readOnly"]
    assert {each["name"] for each in pod["volumes"]} == set(mounts)


def test_models_cannot_be_changed_over_the_network():
    arguments = CONTAINER["args"]
    assert any(each.startswith("--model-control-mode=none") for each in arguments)
    closed = [each for each in arguments if "restricted" in each]
    assert len(closed) == 2
    assert all("model-repository,shared-memory" in each for each in closed)
    assert all(each.endswith("$(ADMIN_KEY)") for each in closed)
    assert KSERVE["spec"]["predictor"]["model"]["args"] == ["--model-control-mode=none"]
    (grace,) = re.findall(r"--exit-timeout-secs=(\d+)", " ".join(arguments))
    assert int(grace) < DEPLOYMENT["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


def test_the_server_knows_every_option():
    folder = triton_binary.default_folder()
    if not folder.exists():
        pytest.skip("the Triton server has not been installed")
    triton = triton_binary.TritonBinary(folder)
    done = subprocess.run(
        [str(triton.program), "--help"], env=triton.variables(), capture_output=True, text=True
    )
    options = [each.partition("=")[0] for each in CONTAINER["args"]]
    assert len(options) == 5
    for option in [*options, *re.findall(r"tritonserver (--[\w-]+)", PAGE)]:
        assert re.search(rf"^  {option} ", done.stdout + done.stderr, re.M), option


def test_both_scalers_ask_the_same_question_and_compare_the_answer_as_it_is():
    assert SCALER["spec"]["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]
    (trigger,) = SCALER["spec"]["triggers"]
    (metric,) = KSERVE["spec"]["predictor"]["autoScaling"]["metrics"]
    external = metric["external"]
    assert external["metric"]["query"] == trigger["metadata"]["query"]
    assert external["metric"]["serverAddress"] == trigger["metadata"]["serverAddress"]
    assert external["target"] == {"type": "Value", "value": trigger["metadata"]["threshold"]}
    assert trigger["metricType"] == "Value"
    assert set(re.findall(r'model="(\w+)"', trigger["metadata"]["query"])) == {"sparse"}


def test_the_page_names_the_files_and_commands_that_exist():
    assert set(re.findall(r"\]\((deploy/\S+?)\)", PAGE)) == {
        f"deploy/{path.name}" for path in FOLDER.iterdir()
    }
    known = set(typer.main.get_command(commands.app).commands)
    assert set(re.findall(r"python -m helpers ([a-z][\w-]*)", PAGE)) <= known


def test_the_page_explains_every_metric_that_is_asked_for():
    asked = set(re.findall(r"\b(nv_\w+|model_\w+)(?=\{)", str(BY_KIND)))
    assert asked == {"nv_inference_queue_duration_us", "nv_inference_request_success"}
    assert all(name in PAGE for name in asked)
