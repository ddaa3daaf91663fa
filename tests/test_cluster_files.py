"""The cluster files, checked without a cloud: Ray's own validator and scheduler, KubeRay's schemas, our rules."""

import copy
import importlib
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
README = (ROOT / "cluster" / "README.md").read_text()
K8S = ROOT / "cluster" / "k8s"
CLOUDS = ["aws", "gcp"]

# What Ray's validator leaves unchecked. AWS: parameters of RunInstances; GCP: the body of instances.insert.
_TEXT = {"type": "string", "minLength": 1}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


_DISK = {
    "boot": {"const": True},
    "autoDelete": {"const": True},
    "type": {"const": "PERSISTENT"},
    "initializeParams": _object({"diskSizeGb": {"type": "integer", "minimum": 50}, "sourceImage": _TEXT}),
}
NODE_CONFIG = {
    "aws": _object(
        {
            "InstanceType": {"pattern": r"^[a-z0-9-]+\.[a-z0-9]+$"},
            "ImageId": {"pattern": r"^ami-"},
            "IamInstanceProfile": _object({"Name": _TEXT}),
            "MetadataOptions": _object({"HttpTokens": {"const": "required"}, "HttpEndpoint": {"const": "enabled"}}),
            "BlockDeviceMappings": {
                "type": "array",
                "items": _object(
                    {
                        "DeviceName": _TEXT,
                        "Ebs": _object({"VolumeSize": {"type": "integer", "minimum": 100}, "VolumeType": _TEXT}),
                    }
                ),
            },
        },
        {"InstanceMarketOptions": _object({"MarketType": {"const": "spot"}})},
    ),
    "gcp": _object(
        {"machineType": _TEXT, "disks": {"type": "array", "items": _object(_DISK), "minItems": 1}},
        {
            # An object: the list of objects in Ray's defaults.yaml is not what the API takes.
            "scheduling": _object(
                {"onHostMaintenance": {"const": "TERMINATE"}, "automaticRestart": {"const": False}},
                {"provisioningModel": {"const": "SPOT"}, "instanceTerminationAction": {"const": "DELETE"}},
            ),
            "metadata": _object({"items": {"type": "array", "items": _object({"key": _TEXT, "value": _TEXT})}}),
            "serviceAccounts": {
                "type": "array",
                "items": _object({"email": {"pattern": "@"}, "scopes": {"type": "array", "items": _TEXT}}),
            },
        },
    ),
}


def load(cloud: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / f"{cloud}-spot.yaml").read_text())


def node_types(cloud: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The head's type, and the workers' types by name."""
    config = load(cloud)
    types = dict(config["available_node_types"])
    return types.pop(config["head_node_type"]), types


def is_spot(node_type: dict[str, Any]) -> bool:
    node_config = node_type["node_config"]
    return "InstanceMarketOptions" in node_config or "provisioningModel" in node_config.get("scheduling", {})


def pins() -> dict[str, str]:
    lines = (ROOT / "cluster" / "requirements.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in requirements}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_accepts_the_cluster_file(cloud):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(load(cloud))))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_each_machine_is_described_in_the_clouds_own_words(cloud):
    head, workers = node_types(cloud)
    for name, node_type in {"head": head, **workers}.items():
        jsonschema.validate(node_type["node_config"], NODE_CONFIG[cloud])
        assert is_spot(node_type) == name.startswith("spot-"), name


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_head_is_on_demand_without_gpu_or_work_and_workers_cost_nothing_when_idle(cloud):
    head, workers = node_types(cloud)
    assert head["resources"] == {"CPU": 0}
    assert not is_spot(head)
    assert load(cloud)["idle_timeout_minutes"] <= 15
    assert all(each["min_workers"] == 0 for each in workers.values())
    assert len({each["node_config"].get("InstanceType", each["node_config"].get("machineType"))
                for each in workers.values() if is_spot(each)}) >= 2  # fmt: skip


@pytest.mark.parametrize("cloud", CLOUDS)
def test_rays_scheduler_takes_spot_types_by_priority_and_on_demand_only_when_none_can_be_had(cloud):
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    _, workers = node_types(cloud)
    types = AutoscalingConfig(load(cloud), skip_content_hash=True).get_node_type_configs()
    for number, each in enumerate(types.values()):  # as Ray finds it out on AWS; nothing may be chosen by its memory
        each.resources = {**each.resources, "memory": 10**12 * (1 + number)}

    def chosen(unavailable: list[str], gpus: int = 8) -> list[str]:
        worker = ResourceRequestUtil.make({"CPU": 1, "GPU": 1})
        reply = ResourceDemandScheduler().schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=types,
                max_num_nodes=load(cloud)["max_workers"],
                resource_requests=ResourceRequestUtil.group_by_count([worker] * gpus),
                recoverable_resource_availabilities=dict.fromkeys(unavailable, 0.0),
            )
        )
        return [launch.instance_type for launch in reply.to_launch for _ in range(launch.count)]

    spot = sorted((name for name in workers if is_spot(workers[name])), key=lambda name: -workers[name]["priority"])
    for failed in range(len(spot)):
        assert chosen(spot[:failed]) == [spot[failed]]
    (fallback,) = set(workers) - set(spot)
    assert chosen(spot) == [fallback]
    assert chosen([], gpus=16) == [spot[0], spot[0]]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_token_authentication_is_on_wherever_ray_starts_and_the_token_is_on_every_machine(cloud):
    config = load(cloud)
    starts = [
        command
        for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]
        if "ray start" in command
    ]
    assert len(starts) == 2
    for command in starts:
        assert command.startswith("export RAY_AUTH_MODE=token")
        assert "--dashboard-host" not in command
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_watcher_starts_beside_ray_with_flags_that_it_knows(cloud):
    from cluster.notice_watcher import build_parser

    config = load(cloud)
    (command,) = [each for each in config["worker_start_ray_commands"] if "cluster.notice_watcher" in each]
    flags = shlex.split(command.partition("cluster.notice_watcher")[2])
    args = build_parser().parse_args(flags)
    assert args.cloud == cloud
    assert "--setenv=RAY_AUTH_MODE=token" in command
    folder = command.partition("--working-directory=$HOME/")[2].split()[0]
    assert config["file_mounts"][f"~/{folder}/cluster"] == "cluster"  # where `python -m cluster.…` finds it


@pytest.mark.parametrize("cloud", CLOUDS)
def test_what_a_cluster_file_mounts_and_installs_exists(cloud):
    config = load(cloud)
    local = [path for path in config["file_mounts"].values() if not path.startswith("~")]
    assert local
    assert all((ROOT / path).exists() for path in local)
    (installed,) = re.findall(r"-r ~/nanochat_ray/(\S+)", " ".join(config["setup_commands"]))
    assert (ROOT / installed).is_file()
    (python,) = re.findall(r"--python (3\.\d+)", " ".join(config["setup_commands"]))
    assert python == "3.11"


def test_the_machines_of_a_cluster_get_versions_that_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    have = pins()
    for text in project["dependencies"]:
        wanted = Requirement(text)
        assert have[canonicalize_name(wanted.name)] in wanted.specifier, text


def manifests() -> dict[str, dict[str, Any]]:
    """Every Kubernetes object by kind and name."""
    documents = [each for path in sorted(K8S.glob("*.yaml")) for each in yaml.safe_load_all(path.read_text())]
    return {f"{each['kind']}/{each['metadata']['name']}": each for each in documents}


def unknown_keys(value: Any, schema: dict[str, Any], place: str = "") -> list[str]:
    """Keys that the schema does not list. KubeRay's schemas allow any, and Kubernetes then drops them in silence."""
    if isinstance(value, list) and "items" in schema:
        return [key for each in value for key in unknown_keys(each, schema["items"], place)]
    if not isinstance(value, dict) or "properties" not in schema:
        return []
    listed = schema["properties"]
    return [f"{place}.{key}" for key in value if key not in listed] + [
        found for key in value if key in listed for found in unknown_keys(value[key], listed[key], f"{place}.{key}")
    ]


@pytest.mark.slow  # KubeRay's schemas are megabytes of YAML
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_kuberay_accepts_the_manifests_and_knows_every_key(kind, shared_data):
    schema = json.loads((shared_data / "k8s" / f"{kind.lower()}s.v1.schema.json").read_text())
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    found = [each for each in manifests().values() if each["kind"] == kind]
    assert found
    for manifest in found:
        jsonschema.validate(manifest, schema)
        assert unknown_keys(manifest, schema) == []


def test_a_misspelt_key_would_be_noticed():
    schema = {"properties": {"spec": {"items": {"properties": {"replicas": {}}}}}}
    assert unknown_keys({"spec": [{"replicas": 1}, {"replica": 1}]}, schema) == [".spec.replica"]


def test_there_is_one_job_per_stage_and_each_command_line_is_one_that_the_stage_takes():
    jobs = {name: each["spec"] for name, each in manifests().items() if name.startswith("RayJob/")}
    modules = []
    for name, spec in jobs.items():
        assert spec["clusterSelector"] == {"ray.io/cluster": "nanochat-ray"}, name
        python, flag, module, *flags = shlex.split(spec["entrypoint"])
        assert (python, flag) == ("python", "-m")
        importlib.import_module(module).build_parser().parse_args(flags)
        modules.append(module.removeprefix("jobs."))
        # Stages that use torch in the job's own process must be sent to a machine with a GPU.
        assert (spec.get("entrypointNumGpus") == 1) == (module in ("jobs.base_eval", "jobs.chat_eval")), name
    assert modules == ["tokenizer", "pretrain", "base_eval", "sft", "chat_eval", "report"]  # in the order of the files


def ray_clusters() -> dict[str, dict[str, Any]]:
    """What describes the pods of each Ray cluster, by the name of its object."""
    objects = manifests()
    return {
        "RayCluster": objects["RayCluster/nanochat-ray"]["spec"],
        "RayService": objects["RayService/nanochat-ray-chat"]["spec"]["rayClusterConfig"],
    }


@pytest.mark.parametrize("kind", ["RayCluster", "RayService"])
def test_pods_have_time_to_drain_and_only_spot_groups_tolerate_spot(kind):
    spec = ray_clusters()[kind]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nodeSelector" not in spec["headGroupSpec"]["template"]["spec"]
    shapes = []
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        environment = {each["name"]: each["value"] for each in container["env"]}
        assert pod["terminationGracePeriodSeconds"] > int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) > 0
        spot = [key for key in [*pod["nodeSelector"], *(each["key"] for each in pod["tolerations"])] if "spot" in key]
        assert len(spot) == (2 if group["groupName"] == "spot" else 0)
        assert group["minReplicas"] == 0
        shapes.append(container["resources"])
    assert shapes[0] == shapes[1]
    assert [group["priority"] for group in spec["workerGroupSpecs"]] == [10, 0]


@pytest.mark.parametrize("kind", ["RayCluster", "RayService"])
def test_state_token_and_password_come_from_where_the_manifests_put_them(kind):
    objects, spec = manifests(), ray_clusters()[kind]
    assert spec["authOptions"] == {"mode": "token"}
    storage = spec["gcsFaultToleranceOptions"]
    host, port = storage["redisAddress"].removeprefix("redis://").split(":")
    assert objects[f"Service/{host}"]["spec"]["ports"] == [{"port": int(port)}]
    (redis,) = objects[f"Deployment/{host}"]["spec"]["template"]["spec"]["containers"]
    assert redis["env"][0]["valueFrom"] == storage["redisPassword"]["valueFrom"]


@pytest.mark.parametrize("kind", ["RayCluster", "RayService"])
def test_images_and_versions_are_the_projects(kind):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    spec = ray_clusters()[kind]
    assert spec["rayVersion"] == pins()["ray"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    images = {each["image"] for group in groups for each in group["template"]["spec"]["containers"]}
    assert images == {f"REGISTRY-REPLACE/nanochat_ray:{version}"}
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    assert images.pop() in dockerfile
    assert "FROM python:3.11-slim" in dockerfile
    assert re.search(r"^USER (?!0$|root$)", dockerfile, re.MULTILINE)
    copied = re.findall(r"^COPY (\S+)", dockerfile, re.MULTILINE)
    assert copied == ["requirements.txt"]
    assert "!requirements.txt" in (ROOT / "cluster" / ".dockerignore").read_text()


def test_the_script_for_own_machines_is_valid_and_explains_itself():
    script = ROOT / "cluster" / "local.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    told = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "cluster/local.sh join HOST:PORT" in told
    for wrong in ([], ["begin"], ["join"]):
        assert subprocess.run([script, *wrong], capture_output=True, check=False).returncode == 2


def test_what_a_user_must_replace_is_named_in_the_readme():
    files = [path for path in (ROOT / "cluster").rglob("*") if path.suffix in (".yaml", ".sh")]
    for placeholder in {name for path in files for name in re.findall(r"[\w-]*REPLACE[\w-]*", path.read_text())}:
        assert placeholder in README


def test_every_job_in_the_readme_is_one_that_the_stage_takes():
    shell = dict(re.findall(r'\b(RUN|DATA)="([^"]*)"', README))
    commands = re.findall(r"ray job submit (.*?)-- python -m (jobs\.\w+)(.*)", README)
    assert [module for _, module, _ in commands] == [
        f"jobs.{stage}" for stage in ("tokenizer", "pretrain", "base_eval", "sft", "chat_eval", "report")
    ]
    for options, module, flags in commands:
        for name, text in shell.items():
            flags = flags.replace(f"${name}", text)
        importlib.import_module(module).build_parser().parse_args(shlex.split(flags))
        assert "--working-dir ." in options
        assert ("--entrypoint-num-gpus 1" in options) == (module in ("jobs.base_eval", "jobs.chat_eval"))


def test_every_file_in_the_readme_exists():
    named = set(re.findall(r"(?:cluster|tests)/[\w./*-]+\w", README))
    assert {"cluster/local.sh", "cluster/notice_watcher.py", "tests/test_job_submit.py"} <= named
    assert [name for name in named if not list(ROOT.glob(name))] == []
    stages = re.findall(r"for stage in ([^;]*);", README)[0].split()
    assert [f"ray-job-{stage}.yaml" for stage in stages] == sorted(path.name for path in K8S.glob("ray-job-*"))
    assert {stage.split("-", 1)[1] for stage in stages} == {
        name.removeprefix("RayJob/") for name in manifests() if name.startswith("RayJob/")
    }


@pytest.mark.parametrize(
    ("row", "hardware"), [("8 A100 80 GB", "8xA100"), ("8 H100", "8xH100"), ("16 H100", "16xH100")]
)
def test_the_readmes_costs_are_the_plans(row, hardware, capsys):
    plan = importlib.import_module("jobs.plan")
    plan.main(plan.build_parser().parse_args(["--depth", "20", "--hardware", hardware]))
    printed = capsys.readouterr().out
    time, on_demand, spot = (re.search(rf"\n  {what} +(\S.*?)  ", printed)[1] for what in
                             ("time", "money, on demand", "money, spot"))  # fmt: skip
    shown = re.search(rf"\| {row} \| (.*?) \| \$(\d+) \| \$(\d+) \|", README).groups()
    minutes = re.match(r"(?:(\d+) h )?(\d+) min(?: (\d+) s)?", time).groups(default="0")
    assert re.match(r"(?:(\d+) h )?(\d+) min", shown[0]).groups(default="0") == (
        minutes[0],
        f"{int(minutes[1]) + (int(minutes[2]) >= 30):02}",
    )
    assert [float(each) for each in shown[1:]] == [round(float(each.lstrip("$"))) for each in (on_demand, spot)]
