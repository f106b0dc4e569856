"""Code that loads, merges and serves what a run has made."""

import shlex
from collections.abc import Mapping

import jax

from lorax_flax.models.family import Task

# transformers' classes that load a model of each task, and the hub's name of it.
CLASSES: dict[Task, str] = {
  "sequence-classification": "AutoModelForSequenceClassification",
  "causal-lm": "AutoModelForCausalLM",
  "seq2seq-lm": "AutoModelForSeq2SeqLM",
  "image-classification": "AutoModelForImageClassification",
}
PIPELINES: dict[Task, str] = {
  "sequence-classification": "text-classification",
  "causal-lm": "text-generation",
  "seq2seq-lm": "text2text-generation",
  "image-classification": "image-classification",
}


def of_adapter(
  task: Task, base: str, hub_name: str, folder: str, outputs: int | None, peft: bool
) -> dict[str, str]:
  """Code by heading.

  Args:
    base: the base as our commands take it.
    hub_name: the base as transformers takes it.
    folder: of the adapter.
    outputs: width of its head; None where that is the base's own.
    peft: whether it is in PEFT's format, else it is in our own.
  """
  more = "" if outputs is None else f", num_labels={outputs}"
  where = f"--base={shlex.quote(base)} --adapter={shlex.quote(folder)}"
  found = {}
  if peft:
    found["Load with PEFT"] = f"""\
from peft import PeftModel
from transformers import {CLASSES[task]}

base = {CLASSES[task]}.from_pretrained({hub_name!r}{more})
model = PeftModel.from_pretrained(base, {folder!r})
"""
  found["Load with lorax_flax"] = f"""\
import lorax_flax as lx
from lorax_flax.models import with_adapter

base, saved = with_adapter.load({base!r}, {folder!r})
params = lx.merge(base.params, saved.adapter)
# outputs = base.module.apply({{"params": params}}, **inputs)
"""
  found["Predict"] = f"lorax predict {where} --input=IN.jsonl --out=OUT.jsonl"
  found["Merge"] = f"lorax merge {where} --out=merged"
  return found | of_model(task, "merged", "Serve what was merged")


def of_model(task: Task, folder: str, heading: str = "Serve") -> dict[str, str]:
  """Code that serves a checkpoint in transformers' form."""
  if task == "causal-lm":
    return {heading: f"vllm serve {shlex.quote(folder)}"}
  if task == "seq2seq-lm":
    load = f"model = {CLASSES[task]}.from_pretrained({folder!r})"
    return {heading: f"from transformers import {CLASSES[task]}\n\n{load}"}
  load = f"answer = pipeline({PIPELINES[task]!r}, model={folder!r})"
  return {heading: f"from transformers import pipeline\n\n{load}"}


def of_orbax(folder: str) -> dict[str, str]:
  """Code that restores weights as `hub.checkpoints.export_orbax` writes them.

  Args:
    folder: name of the folder of the weights.
  """
  restore = f"""\
from pathlib import Path
import orbax.checkpoint as ocp

with ocp.StandardCheckpointer() as checkpointer:
  params = checkpointer.restore(Path({folder!r}).absolute())
"""
  run = """\
from lorax_flax.models import registry

module = registry.outline(registry.read_config(Path("."))).module
# outputs = module.apply({"params": params}, **inputs)
"""
  return {"Restore": restore, "Run with lorax_flax": run}


def of_stablehlo(inputs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, str]:
  """Code that runs a program as `hub.checkpoints.export_stablehlo` writes it.

  Args:
    inputs: of the program, by name. Examples are of 2 rows of 8 tokens.
  """

  def example(like: jax.ShapeDtypeStruct) -> str:
    sizes = {"batch": 2}
    shape = [n if isinstance(n, int) else sizes.get(str(n), 8) for n in like.shape]
    return f"np.ones(({', '.join(map(str, shape))}), np.{like.dtype})"

  rows = (f"  {name!r}: {example(like)},\n" for name, like in inputs.items())
  code = f"""\
# pip install jax numpy safetensors flatbuffers
import numpy as np
from jax import export, jit
from safetensors.flax import load_file

with open("model.stablehlo", "rb") as file:
  model = jit(export.deserialize(bytearray(file.read())).call)
params = load_file("model.safetensors")
inputs = {{
{"".join(rows)}}}
logits = model(params, inputs)
"""
  return {"Run": code}
