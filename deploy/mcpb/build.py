"""Build desktop bundles: dist/fs.mcpb, dist/db.mcpb and dist/api.mcpb, to be opened with Claude Desktop.

    python deploy/mcpb/build.py

Each holds a server, the files it needs, and a manifest that asks for the directories, database files or APIs file.
Python and the packages are not in it: the application's own uv brings them at the first start. The official tool
checks and packs the same directories: `npx @anthropic-ai/mcpb validate dist/mcpb/fs`, then with `pack`.
"""

import re
import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
MODULES = {
    "fs": ["fs_server.py", "serving.py", "common.py"],
    "db": ["db_server.py", "serving.py", "common.py"],
    "api": ["api_server.py", "api_openapi.py", "serving.py", "common.py"],
}


def stage(kind: str, directory: Path) -> None:
    """Put together what goes into a bundle."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for path in (HERE / kind / "manifest.json", PROJECT / "LICENSE", *(PROJECT / name for name in MODULES[kind])):
        shutil.copy(path, directory)
    # The format wants a project file; the dependencies are those at the top of the server's own file.
    dependencies = re.search(r"^# (dependencies = .*)$", (directory / MODULES[kind][0]).read_text(), re.MULTILINE)
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert dependencies
    (directory / "pyproject.toml").write_text(
        f'[project]\nname = "small-mcp-servers-{kind}"\nversion = "{project["version"]}"\n'
        f'requires-python = "{project["requires-python"]}"\n{dependencies[1]}\n'
    )


def build(dist: Path) -> None:
    """Make all bundles; a bundle is a zip archive with another ending."""
    for kind in MODULES:
        stage(kind, dist / "mcpb" / kind)
        bundle = Path(shutil.make_archive(str(dist / kind), "zip", dist / "mcpb" / kind)).rename(dist / f"{kind}.mcpb")
        print(bundle)


if __name__ == "__main__":
    build(PROJECT / "dist")
