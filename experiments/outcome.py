"""What a run writes of what it has trained."""

from collections.abc import Callable
from pathlib import Path

import lorax_flax as lx
from experiments.kind import Kind
from experiments.settings import Settings
from lorax_flax.hub import export as hub_export
from lorax_flax.hub import peft, peft_config
from lorax_flax.methods import Adapter, LowRank
from lorax_flax.models import registry
from lorax_flax.train import mesh as meshes
from lorax_flax.train import processes


def export(
  wanted: Settings, kind: Kind, loaded: registry.Loaded
) -> Callable[[Adapter, Path], dict[str, str]]:
  """Makes what `lorax_flax.train.loop.Job` asks for: adapter/, or the whole model/."""

  def write(adapter: Adapter, workdir: Path) -> dict[str, str]:
    if any(isinstance(delta, LowRank) for delta in adapter.values()):
      target = workdir / "adapter"
      if not processes.first():
        return {"adapter": str(target)}
      peft.write_adapter(
        target,
        adapter,
        loaded.keymap,
        wanted.lora,
        base_name=wanted.model.path,
        labels=kind.labels,
        task_type=peft_config.TASK_TYPES[loaded.family.task],
      )
      return {"adapter": str(target)}
    # Nothing in it is low-rank: as an adapter it would be the model all over.
    target = workdir / "model"
    merged = meshes.gather(lx.merge(loaded.params, adapter))
    if not processes.first():
      return {"model": str(target)}
    hub_export.write_checkpoint(
      target,
      merged,
      loaded.keymap,
      loaded.hf_config,
      architecture=loaded.family.architecture,
      labels=kind.labels,
      tokenizer_from=loaded.folder,
      may_replace=lambda old: (old / "config.json").is_file(),
    )
    return {"model": str(target)}

  return write
