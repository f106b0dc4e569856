"""The GPU benchmark's table of given figures, and the FLOPs that it divides."""

import dataclasses
import json
import sys

import pytest

from benchmarks import common, gpu
from launch.dryrun import jaxpr_flops

SHAPE = dataclasses.replace(
  common.LLAMA_1B,
  layers=2,
  hidden=64,
  heads=4,
  kv_heads=2,
  mlp=128,
  vocab=256,
  batch=2,
  length=32,
)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_needed_flops_are_the_steps(method):
  """The step multiplies with every key, causality needs half of them; and twice by a
  head that is trained, of which it keeps no logits.
  """
  case = gpu.Case("", "train", SHAPE, method)
  name = {"lora": "all_linear"}.get(method, method)
  job = common.job(SHAPE, name, scan=True, abstract=True)
  traced = job.step.trace(job.state, job.base, job.batch)
  square = 2 * SHAPE.batch * SHAPE.length**2 * SHAPE.hidden
  head = 2 * SHAPE.batch * SHAPE.length * SHAPE.hidden * SHAPE.vocab
  more = 3 * SHAPE.layers * square + (head if method == "full" else 0)
  counted = jaxpr_flops.matmul_flops(traced.jaxpr) - more
  assert gpu.needed_flops(case) == pytest.approx(counted, rel=0.02)


def test_a_table_of_recorded_figures(tmp_path, monkeypatch, capsys):
  """Each side's fastest way counts, and nothing runs again."""
  file, name = tmp_path / "figures.jsonl", "1b-2k lora"
  card = {"card": "NVIDIA H100 80GB HBM3", "versions": "1", "bytes": 2**30}
  found = {
    "lorax_flax/loop/none": {"error": "out of memory"},
    "lorax_flax/scan/none": {"seconds": 0.2, **card},
    "lorax_flax/scan/inputs": {"seconds": 0.3, **card},
    "lorax_flax/scan/full": {"seconds": 0.3, **card},
    "peft/loop/none": {"seconds": 0.4, **card},
  }
  lines = [json.dumps({"row": name, "way": way, **row}) for way, row in found.items()]
  file.write_text("\n".join(lines) + "\n")
  asked = []
  monkeypatch.setattr(gpu, "run", lambda case, _: asked.append(case) or {"error": "x"})
  monkeypatch.setattr(gpu.common, "repeat", lambda: "")
  monkeypatch.setattr(sys, "argv", ["gpu", f"--only=^{name}$", f"--out={file}"])
  gpu.main()
  assert [case.remat for case in asked] == ["full"]
  assert len(file.read_text().splitlines()) == 6
  row = capsys.readouterr().out.splitlines()[-2].split()
  ours, theirs = ["40,960", "1.0", "22%", "scan/none"], ["20,480", "1.0", "11%", "none"]
  assert row[2:] == [*ours, *theirs, "2.00"]


def test_texts_of_a_row_are_numbered():
  case = gpu.Case("", "train", SHAPE, "lora", segments=3)
  numbers = case.segments_T().tolist()
  assert sorted(set(numbers)) == [1, 2, 3]
  assert numbers == sorted(numbers)
