"""What the compose file and the pods of Kubernetes leave open."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


def test_the_server_of_several_hosts_is_closed() -> None:
    """Nothing listens beyond the address that is given, and nothing starts without its secrets and names."""
    services: dict[str, Any] = yaml.safe_load((ROOT / "deploy/several-hosts/compose.yaml").read_text())["services"]
    assert "ports" not in services["database"]
    server = services["server"]
    assert all(port.startswith("${PREFECT_ADDRESS:-127.0.0.1}:") for port in server["ports"])
    environment = server["environment"]
    assert environment["PREFECT_SERVER_API_AUTH_STRING"] == "${PREFECT_AUTH_STRING:?}"
    assert "*" not in environment["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"]
    assert environment["LORASUITE_ALLOWED_HOSTS"].endswith("${PREFECT_HOSTS:?}")
    (mount,) = server["volumes"]
    source, target, access = mount.split(":")
    module, name = server["command"].partition("--factory ")[2].split()[0].split(":")
    assert (Path(target).stem, access) == (module, "ro")
    tree = ast.parse((ROOT / "deploy/several-hosts" / source).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    allowed = {"__future__", "os", "typing", "prefect", "starlette"}  # what Prefect's image has
    assert {name.split(".")[0] for name in imported} <= allowed


def test_pods_have_no_rights_beyond_their_work() -> None:
    template = json.loads((ROOT / "deploy/kubernetes/job-template.json").read_text())
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False and "hostNetwork" not in pod
    (container,) = pod["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert "ports" not in container
    deployments = yaml.safe_load((ROOT / "deploy/kubernetes/prefect.yaml").read_text())["deployments"]
    for deployment in deployments:
        environment = deployment["work_pool"]["job_variables"]["env"]
        assert environment["LORASUITE_FLEETS"].startswith("/") and "LORASUITE_TRUSTED_CODE" not in environment
    (fleet,) = [d["parameters"]["fleet"] for d in deployments if d["name"] == "migrate-fleet"]
    assert "/" not in fleet
