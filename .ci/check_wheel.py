"""Install the built wheel in a clean environment and use it from there.

Usage: python .ci/check_wheel.py WHEEL_DIR CLEAN_ENVIRONMENT_DIR
Third-party dependencies are borrowed from the running environment through a .pth file, to save minutes; its editable
install of this project is not (Python reads .pth files of site directories only), so flm comes from the wheel.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECK = """
import importlib, pkgutil, sys
site, packages = sys.argv[1], sys.argv[2:]
for name in packages:
    package = importlib.import_module(name)
    for place in package.__path__:
        assert place.startswith(site), f"{name} comes from {place}, not from the wheel in {site}"
"""


def main() -> None:
    wheels, target = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
    newest = max(wheels.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    venv.create(target, clear=True, with_pip=False)
    python = target / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", str(newest)], check=True)
    query = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    subprocess.run([str(python), "-c", CHECK, site, *packages], check=True, cwd=target)
    shown = subprocess.run(
        [str(target / "bin" / "flm-cluster"), "--help"], check=True, capture_output=True, cwd=target
    )
    if b"Usage" not in shown.stdout:
        raise SystemExit("flm-cluster --help printed no usage")
    print(f"{newest.name}: {len(packages)} packages import, flm-cluster --help runs")


if __name__ == "__main__":
    main()
