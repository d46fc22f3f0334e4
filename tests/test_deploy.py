"""The container image and the Kubernetes manifest.

No container engine is needed, and none is used: the steps of the image are run as they stand in the Dockerfile, with
its paths moved into a temporary directory and a new virtual environment as its base, and the result is run as the image
would be: its user, its environment and its command, on a file system without a place to write.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate  # pyright: ignore[reportMissingTypeStubs]
import pytest
import yaml
from conftest import PROJECT
from over_http import TOKEN, Http, request

DOCKERFILE = (PROJECT / "deploy" / "Dockerfile").read_text()
MANIFEST = PROJECT / "deploy" / "kubernetes.yaml"
MANIFESTS: list[dict[str, Any]] = [part for part in yaml.safe_load_all(MANIFEST.read_text()) if part]
KINDS = {part["kind"]: part for part in MANIFESTS}
CONTAINER = KINDS["Deployment"]["spec"]["template"]["spec"]["containers"][0]


def instructions(name: str) -> list[str]:
    """What follows an instruction of the Dockerfile, in order, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return re.findall(rf"^\s*{name} (.*)$", joined, re.MULTILINE)


# ------------------------------------------------------------------------------------------------------- the image


class Image:
    """The directories that the image would have, made by its own steps."""

    def __init__(self, directory: Path) -> None:
        self.base, self.opt, self.app = directory / "base", directory / "opt", directory / "app"
        subprocess.run([sys.executable, "-m", "venv", self.base], check=True)
        self.app.mkdir()
        for name in ("requirements.txt", *(path.name for path in PROJECT.glob("*.py"))):  # COPY requirements.txt *.py
            (self.app / name).write_bytes((PROJECT / name).read_bytes())
        for step in instructions("RUN"):
            path = f"{self.base / 'bin'}:/usr/bin:/bin"
            subprocess.run(["/bin/sh", "-ec", self.moved(step)], check=True, env={**os.environ, "PATH": path})

    def moved(self, text: str) -> str:
        return re.sub(r"/(opt|app)/", lambda match: f"{self.base.parent}/{match[1]}/", text)

    @property
    def environment(self) -> dict[str, str]:
        words = shlex.split(self.moved(" ".join(instructions("ENV"))))
        return dict(word.split("=", 1) for word in words)

    def run(self, command: list[str], **env: str) -> subprocess.Popen[bytes]:
        """Start a command as the container would, as far as the rights of the test go."""
        user, group = instructions("USER")[0].split(":")
        if can_make_read_only():
            # CAP_DAC_READ_SEARCH reads what the user may not (Python itself may be in root's home), and writes nothing.
            inner = "mount -o remount,bind,ro / && exec setpriv --reuid=$0 --regid=$1 --clear-groups --no-new-privs"
            inner += " --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search -- " + '"${@:2}"'
            command = ["unshare", "-m", "bash", "-ec", inner, user, group, *command]
        environment = {**self.environment, **env}
        executable = next(
            path
            for part in (environment["PATH"] + ":/usr/sbin:/sbin").split(":")
            if (path := Path(part) / command[0]).exists()
        )
        return subprocess.Popen(
            [str(executable), *command[1:]],
            cwd=self.app,
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )


@cache
def can_make_read_only() -> bool:
    try:
        command = ["unshare", "-m", "sh", "-ec", "mount -o remount,bind,ro / && setpriv --reuid=1 true"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    made = Image(tmp_path_factory.mktemp("image"))
    directories = [Path(directory) for root in (made.opt, made.app) for directory, _, _ in os.walk(root)]
    for directory in directories:
        directory.chmod(0o555)
    yield made
    for directory in directories:
        directory.chmod(0o755)


def test_the_base_is_slim_and_pinned_and_the_user_is_not_root() -> None:
    bases = instructions("FROM")
    assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+( AS build)?", base) for base in bases)
    assert bases[0].removesuffix(" AS build") == bases[1]
    user, group = instructions("USER")[0].split(":")
    assert int(user) >= 10_000
    assert int(group) >= 10_000
    assert instructions("USER") == [f"{user}:{group}"]
    assert DOCKERFILE.index("USER") < DOCKERFILE.index("ENTRYPOINT")


def test_the_same_packages_are_installed_as_everywhere(image: Image) -> None:
    listed = subprocess.run(
        [image.opt / "venv" / "bin" / "python", "-c", "import mcp, aiosqlite, httpx, asyncpg, uvicorn"], check=False
    )
    assert listed.returncode == 0


def test_no_build_tools_are_left(image: Image) -> None:
    for python in (image.base, image.opt / "venv"):
        for module in ("pip", "setuptools", "wheel"):
            found = subprocess.run(
                [python / "bin" / "python", "-c", f"import {module}"], capture_output=True, check=False
            )
            assert b"No module named" in found.stderr or (module == "setuptools" and python == image.base)
    assert not list((image.opt / "venv" / "bin").glob("pip*"))


@pytest.mark.parametrize("server", ["fs_server.py", "db_server.py", "api_server.py"])
def test_the_image_serves_without_a_place_to_write_and_ends_in_good_order(server: str, image: Image) -> None:
    entrypoint, command = (json.loads(instructions(name)[-1]) for name in ("ENTRYPOINT", "CMD"))
    assert command[:2] == ["fs_server.py", "/data"]
    examples = {"fs_server.py": "", "db_server.py": "shop.db", "api_server.py": "local.json"}
    command[:2] = [server, str(PROJECT / "examples" / examples[server])]
    address = command.pop()
    assert address == "0.0.0.0:8000"
    process = image.run([*entrypoint, *command, "0.0.0.0:0"], MCP_AUTH_TOKEN=TOKEN)
    assert process.stderr
    assert process.stdout
    try:
        while not (found := re.search(rb"(http://localhost:(\d+))/mcp", line := process.stderr.readline())):
            assert line, process.wait()
        url, port = found[1].decode(), found[2].decode()
        health = re.search(r"HEALTHCHECK .*?CMD (\[.*\])", re.sub(r"\\\n\s*", "", DOCKERFILE))
        assert health
        check = image.run([word.replace("8000", port) for word in json.loads(health[1])])
        assert (check.wait(20), *check.communicate()) == (0, b"", b"")
        headers, body = request("tools/list")
        assert httpx.post(f"{url}/mcp", json=body, headers=headers).status_code == 401
        answer = httpx.post(f"{url}/mcp", json=body, headers={**headers, "authorization": f"Bearer {TOKEN}"})
        assert len(answer.json()["result"]["tools"]) >= 3
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert not can_make_read_only() or "Uid:\t" + "\t".join(instructions("USER")[0].split(":")[:1] * 4) in status
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        check = image.run([word.replace("8000", port) for word in json.loads(health[1])])
        check.communicate()
        assert check.returncode != 0
    finally:
        process.kill()
        process.communicate()


def test_nothing_can_be_written_where_the_image_runs(image: Image) -> None:
    if not can_make_read_only():
        pytest.skip("making the file system read-only takes a mount namespace, which this user may not make")
    script = (
        "import os, sys\n"
        "for path in sys.argv[1:]:\n"
        "    try: open(os.path.join(path, 'written'), 'w')\n"
        "    except OSError: continue\n"
        "    sys.exit(path)"
    )
    process = image.run(["python", "-c", script, str(image.app), str(image.opt), "/tmp", "/", "/var/tmp"])
    assert process.communicate() == (b"", b"")
    assert process.returncode == 0


# ---------------------------------------------------------------------------------------------------- the manifest


@pytest.mark.parametrize("part", MANIFESTS, ids=lambda part: part["kind"])
@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_each_part_is_valid(part: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(part, version, strict=True)


def test_a_wrong_part_is_not_valid() -> None:
    wrong = json.loads(json.dumps(KINDS["Deployment"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readOnlyRootFilesystem"] = True  # in the wrong place
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_the_manifest_has_all_that_a_team_needs() -> None:
    assert set(KINDS) == {"Secret", "Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"}
    deployment = KINDS["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    assert deployment["replicas"] == 3
    assert CONTAINER["resources"] == {
        "requests": {"memory": "256Mi", "cpu": "250m"},
        "limits": {"memory": "512Mi", "cpu": "500m"},
    }
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == instructions("USER")[0]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert CONTAINER["envFrom"] == [{"secretRef": {"name": KINDS["Secret"]["metadata"]["name"]}}]
    assert set(KINDS["Secret"]["stringData"]) == {"MCP_AUTH_TOKEN", "DATABASE_URL"}
    assert pod["terminationGracePeriodSeconds"] >= CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"] + 15


def test_the_parts_point_at_each_other() -> None:
    labels = KINDS["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert KINDS["Service"]["spec"]["selector"].items() <= labels
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert KINDS[kind]["spec"]["selector"]["matchLabels"].items() <= labels
    assert KINDS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels
    port = CONTAINER["ports"][0]
    assert KINDS["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert KINDS["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"] == port["containerPort"]
    assert CONTAINER["args"][CONTAINER["args"].index("--http") + 1] == f"0.0.0.0:{port['containerPort']}"
    assert KINDS["PodDisruptionBudget"]["spec"]["minAvailable"] < KINDS["Deployment"]["spec"]["replicas"]


def test_the_arguments_and_the_probes_of_the_deployment_are_what_the_server_takes() -> None:
    server, *options = CONTAINER["args"]
    at = options.index("--http")
    del options[at : at + 2]
    http = Http(server, "examples/shop.db", *options, token=TOKEN, address="0.0.0.0:0")
    try:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = CONTAINER[probe]["httpGet"]["path"]
            assert http.client.get(path, headers={"host": "10.1.2.3:8000"}).status_code == 200
        headers, body = request("tools/list")
        headers["authorization"] = f"Bearer {TOKEN}"
        for host, status in (("mcp-db", 200), ("mcp.example.com", 200), ("other", 421)):
            assert http.client.post("/mcp", headers={**headers, "host": host}, json=body).status_code == status
    finally:
        http.close()


def test_a_secret_that_was_not_filled_in_keeps_the_server_from_starting() -> None:
    env = {**os.environ, **KINDS["Secret"]["stringData"]}
    command = [sys.executable, "db_server.py", "examples/shop.db", "--http", "0.0.0.0:0"]
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=PROJECT, env=env, capture_output=True, timeout=30, check=False, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"MCP_AUTH_TOKEN" in done.stderr
    assert time.monotonic() - started < 30
