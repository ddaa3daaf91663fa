"""The Serve config, checked without a cluster: Ray's schema, no key that it would drop, and the builder it names."""

import importlib
import inspect
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from tests.test_cluster_files import ROOT, manifests, ray_clusters


def without_placeholders(text: str) -> Any:
    """A Serve config as a user would deploy it."""
    text = text.replace("CODE-REPLACE", "https://github.com/me/nanochat_ray/archive/0.zip")
    return yaml.safe_load(text.replace("STORAGE-REPLACE", "gs://my-bucket"))


def unknown_fields(value: Any, model: type[BaseModel], place: str = "") -> list[str]:
    """Keys that a pydantic model does not have. Serve's own accept any, and drop them."""
    found = []
    for key, inner in value.items():
        if key not in model.model_fields:
            found.append(f"{place}.{key}")
            continue
        for each in inner if isinstance(inner, list) else [inner]:
            for part in models_in(model.model_fields[key].annotation):
                found += unknown_fields(each, part, f"{place}.{key}") if isinstance(each, dict) else []
    return found


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in a type such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def test_serve_accepts_its_config_and_knows_every_key():
    from ray.serve.schema import ServeDeploySchema

    config = without_placeholders((ROOT / "cluster" / "serve.yaml").read_text())
    ServeDeploySchema.model_validate(config)
    assert unknown_fields(config, ServeDeploySchema) == []
    config["applications"][0]["deployments"][0]["ray_actor_options"]["num_cpu"] = 1
    assert unknown_fields(config, ServeDeploySchema) == [".applications.deployments.ray_actor_options.num_cpu"]


def test_the_rayservice_deploys_that_config():
    held = manifests()["RayService/nanochat-ray-chat"]["spec"]["serveConfigV2"]
    assert yaml.safe_load(held) == yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())


def test_serve_finds_the_application_and_its_builder_takes_these_arguments():
    from nanochat_ray.serve.app import APP_NAME, Served
    from nanochat_ray.serve.replica import EngineReplica

    (application,) = without_placeholders((ROOT / "cluster" / "serve.yaml").read_text())["applications"]
    module, name = application["import_path"].split(":")
    build = getattr(importlib.import_module(module), name)
    (parameter,) = inspect.signature(build).parameters.values()
    assert parameter.annotation is Served  # Serve makes one of the args
    assert Served.model_validate(application["args"]).model_dump(exclude_unset=True) == application["args"]
    with pytest.raises(ValidationError):
        Served.model_validate({**application["args"], "stages": "sft"})
    (deployment,) = application["deployments"]
    assert (application["name"], deployment["name"]) == (APP_NAME, EngineReplica.name)
    groups = {each["groupName"]: each for each in ray_clusters()["RayService"]["workerGroupSpecs"]}
    assert groups["spot"]["maxReplicas"] == application["args"]["max_replicas"]
