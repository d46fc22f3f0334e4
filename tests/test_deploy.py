"""The container image, the Kubernetes manifest, the proxy's configuration, and the desktop bundles.

No container engine is needed, and none is used: the steps of the image are run as they stand in the Dockerfile, with
its paths moved into a temporary directory and a new virtual environment as its base, and the result is run as the image
would be: its user, its environment and its command, on a file system without a place to write.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import httpx
import kubernetes_validate  # pyright: ignore[reportMissingTypeStubs]
import pytest
import yaml
from conftest import PROJECT
from over_http import TOKEN, request, served

import pg_server

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

    def run(self, command: list[str], **env: str) -> subprocess.Popen[bytes]:
        """Start a command as the container would, as far as the rights of the test go."""
        user, group = instructions("USER")[0].split(":")
        if can_make_read_only():
            # CAP_DAC_READ_SEARCH reads what the user may not (Python itself may be in root's home), and writes nothing.
            inner = "mount -o remount,bind,ro / && exec setpriv --reuid=$0 --regid=$1 --clear-groups --no-new-privs"
            inner += " --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search -- " + '"${@:2}"'
            command = ["unshare", "-m", "bash", "-ec", inner, user, group, *command]
        env |= dict(word.split("=", 1) for word in shlex.split(self.moved(" ".join(instructions("ENV")))))
        program = shutil.which(command[0], path=f"{env['PATH']}:/usr/sbin:/sbin")
        words = [str(program), *command[1:]]
        return subprocess.Popen(words, cwd=self.app, env=env, stdin=DEVNULL, stderr=PIPE, stdout=PIPE)


@cache
def can_make_read_only() -> bool:
    try:
        command = ["unshare", "-m", "sh", "-ec", "mount -o remount,bind,ro / && setpriv --reuid=1 true"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    try:
        made = Image(tmp_path_factory.mktemp("image"))
    except subprocess.CalledProcessError:
        if os.environ.get("CI"):
            raise
        pytest.skip("the packages cannot be downloaded")
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
    (user,) = instructions("USER")
    assert all(int(number) >= 10_000 for number in user.split(":"))
    assert DOCKERFILE.index("USER") < DOCKERFILE.index("ENTRYPOINT")


@pytest.mark.slow
def test_all_packages_are_installed_no_build_tools_are_left_and_nothing_can_be_written(image: Image) -> None:
    venv = image.opt / "venv" / "bin"
    subprocess.run([venv / "python", "-c", "import mcp, aiosqlite, httpx, asyncpg, uvicorn"], check=True)
    for python, module in ((image.base / "bin", "pip"), (venv, "pip"), (venv, "setuptools"), (venv, "wheel")):
        found = subprocess.run([python / "python", "-c", f"import {module}"], capture_output=True, check=False)
        assert b"No module named" in found.stderr
    assert not list(venv.glob("pip*"))
    if not can_make_read_only():
        pytest.skip("making the file system read-only takes a mount namespace, which this user may not make")
    for path in (image.app, image.opt, "/tmp", "/", "/var/tmp"):
        assert b"cannot touch" in image.run(["touch", f"{path}/written"]).communicate()[1]


@pytest.mark.slow
@pytest.mark.parametrize("server", ["fs_server.py", "db_server.py", "api_server.py"])
def test_the_image_serves_without_a_place_to_write_and_ends_in_good_order(server: str, image: Image) -> None:
    entrypoint, command = (json.loads(instructions(name)[-1]) for name in ("ENTRYPOINT", "CMD"))
    assert command[:2] + command[-1:] == ["fs_server.py", "/data", "0.0.0.0:8000"]
    examples = {"fs_server.py": "", "db_server.py": "shop.db", "api_server.py": "local.json"}
    command = [server, str(PROJECT / "examples" / examples[server]), *command[2:-1]]
    process = image.run([*entrypoint, *command, "0.0.0.0:0"], MCP_AUTH_TOKEN=TOKEN)
    assert process.stderr
    try:
        while not (found := re.search(rb"(http://localhost:(\d+))/mcp", line := process.stderr.readline())):
            assert line, process.wait()
        url, port = found[1].decode(), found[2].decode()
        health = json.loads(instructions("HEALTHCHECK")[0].partition("CMD ")[2].replace("8000", port))
        check = image.run(health)
        assert (check.wait(20), *check.communicate()) == (0, b"", b"")
        headers, body = request("tools/list")
        assert httpx.post(f"{url}/mcp", json=body, headers=headers).status_code == 401
        answer = httpx.post(f"{url}/mcp", json=body, headers={**headers, "authorization": f"Bearer {TOKEN}"})
        assert len(answer.json()["result"]["tools"]) >= 3
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert not can_make_read_only() or "Uid:\t" + "\t".join(instructions("USER")[0].split(":")[:1] * 4) in status
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        check = image.run(health)
        check.communicate()
        assert check.returncode != 0
    finally:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------------------------------------------- the manifest


def test_each_part_is_valid_and_applying_them_again_writes_over_no_secret() -> None:
    for part in MANIFESTS:
        for version in ("1.30", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(part, version, strict=True)
    assert set(KINDS) == {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"}
    assert not re.search("stringData|MCP_AUTH_TOKEN:|DATABASE_URL:", MANIFEST.read_text())
    (reference,) = CONTAINER["envFrom"]
    (made,) = re.findall(r"create secret generic (\S+) .*\n.*--from-literal=DATABASE_URL=", MANIFEST.read_text())
    assert reference == {"secretRef": {"name": made}}  # not optional: without it, no replica starts


def test_the_replicas_may_do_no_more_than_they_must() -> None:
    pod = KINDS["Deployment"]["spec"]["template"]["spec"]
    limits = {"requests": {"memory": "256Mi", "cpu": "250m"}, "limits": {"memory": "512Mi", "cpu": "500m"}}
    assert CONTAINER["resources"] == limits
    rights = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert CONTAINER["securityContext"] == rights
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == instructions("USER")[0]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["terminationGracePeriodSeconds"] >= CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"] + 15


def test_the_parts_point_at_each_other_and_fit_the_roles_connections() -> None:
    labels = KINDS["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert KINDS["Service"]["spec"]["selector"].items() <= labels
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert KINDS[kind]["spec"]["selector"]["matchLabels"].items() <= labels
    assert KINDS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels
    port = CONTAINER["ports"][0]
    assert KINDS["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert KINDS["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"] == port["containerPort"]
    assert CONTAINER["args"][CONTAINER["args"].index("--http") + 1] == f"0.0.0.0:{port['containerPort']}"
    deployment = KINDS["Deployment"]["spec"]
    assert KINDS["PodDisruptionBudget"]["spec"]["minAvailable"] < deployment["replicas"]
    (limit,) = re.findall(r"CONNECTION LIMIT (\d+)", (PROJECT / "SECURITY.md").read_text())
    most = deployment["replicas"] + deployment["strategy"]["rollingUpdate"]["maxSurge"] + 1  # and one that is ending
    assert int(limit) == most * pg_server.MAX_POOL == 50
    assert "make\n# 50:" in MANIFEST.read_text()


def test_the_arguments_and_the_probes_of_the_deployment_are_what_the_server_takes() -> None:
    _, *options = CONTAINER["args"]
    at = options.index("--http")
    del options[at : at + 2]
    # The same options on the server that needs no PostgreSQL.
    with served("db_server.py", "examples/shop.db", *options, token=TOKEN, address="0.0.0.0:0") as client:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = CONTAINER[probe]["httpGet"]["path"]
            assert client.get(path, headers={"host": "10.1.2.3:8000"}).status_code == 200
        headers, body = request("tools/list")
        for host, status in (("mcp-db", 200), ("mcp.example.com", 200), ("other", 421)):
            assert client.post("/mcp", headers={**headers, "host": host}, json=body).status_code == status


def test_a_secret_that_is_empty_keeps_a_server_from_starting() -> None:
    for missing, server in (("DATABASE_URL", "pg_server.py"), ("MCP_AUTH_TOKEN", "fs_server.py .")):
        words, env = [sys.executable, *server.split(), "--http", "0.0.0.0:0"], {**os.environ, missing: ""}
        done = subprocess.run(words, cwd=PROJECT, env=env, capture_output=True, timeout=30, check=False)
        assert (done.returncode, done.stderr.count(b"\n"), missing.encode() in done.stderr) == (2, 1, True)


# ------------------------------------------------------------------------------------------------------- the proxy

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., httpx.Response]]:
    """The example configuration as it stands, in an nginx of its own: sends one request, and returns the answer."""
    openssl = shutil.which("openssl")
    if not NGINX or not openssl:
        pytest.skip("nginx or openssl is not installed")
    directory = tmp_path_factory.mktemp("nginx")
    certificate = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=mcp.example.com", "-addext"]
    certificate += ["subjectAltName=DNS:mcp.example.com", "-keyout", "privkey.pem", "-out", "fullchain.pem"]
    subprocess.run([openssl, *certificate], cwd=directory, check=True, capture_output=True)
    context = ssl.create_default_context(cafile=directory / "fullchain.pem")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def send(path: str, *, name: str = "mcp.example.com", host: str = "", **options: Any) -> httpx.Response:
        headers, body = request("tools/list")
        headers |= {"host": host or name, "authorization": f"Bearer {options.pop('token', TOKEN)}"}
        options = {"content": json.dumps(body), "extensions": {"sni_hostname": name}, **options}
        with httpx.Client(verify=context, trust_env=False, timeout=30) as client:  # one connection each
            return client.post(f"https://127.0.0.1:{port}{path}", headers=headers, **options)

    with served("fs_server.py", "examples", "--allowed-host", "mcp.example.com", token=TOKEN) as server:
        site = (PROJECT / "deploy" / "nginx.conf").read_text()
        places = {"127.0.0.1:8000": server.base_url.netloc.decode(), "/etc/ssl/mcp/": f"{directory}/"}
        for text, by in {**places, "listen 443 ": f"listen 127.0.0.1:{port} "}.items():
            assert text in site
            site = site.replace(text, by)
        user = "user root;" if os.geteuid() == 0 else ""  # its workers would be another user, who may not enter
        paths = "client_body_temp_path 1; proxy_temp_path 2; fastcgi_temp_path 3; uwsgi_temp_path 4; scgi_temp_path 5;"
        http = f"http {{ access_log access.log; {paths}\n{site}\n}}"
        (directory / "nginx.conf").write_text(f"daemon off; {user} pid pid; error_log error.log; events {{}} {http}")
        log = directory / "error.log"
        process = subprocess.Popen([NGINX, "-p", directory, "-e", log, "-c", directory / "nginx.conf"])
        try:
            while not (directory / "pid").exists():
                assert process.poll() is None, log.read_text()
                time.sleep(0.02)
            yield send
            assert TOKEN not in (directory / "access.log").read_text()
        finally:
            process.terminate()
            process.wait(10)


@pytest.mark.slow
def test_the_proxy_speaks_tls_for_a_server_and_leaves_the_token_to_it(proxy: Callable[..., httpx.Response]) -> None:
    assert len(proxy("/mcp").json()["result"]["tools"]) == 9
    assert proxy("/mcp", token="wrong").status_code == 401
    assert [proxy(path).status_code for path in ("/", "/health", "/mcp/x")] == [404, 404, 404]
    for size, status in ((4 * 2**20, 400), (4 * 2**20 + 1, 413)):  # as much as the server; white space is no JSON
        assert proxy("/mcp", content=b" " * size).status_code == status
    with pytest.raises(httpx.ConnectError, match=r"(?i)unrecognized"):  # its certificate is for no other name
        proxy("/mcp", name="other.example.com")
    with pytest.raises(httpx.RemoteProtocolError):
        proxy("/mcp", host="other.example.com")
