"""What the configs share: every field there is, and the GLUE recipes' defaults."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference, config_dict

from lorax_flax.errors import LoraxError

QUERY_VALUE = ".*/attention/(query|value)/kernel"


def base() -> ConfigDict:
  """Every field that the command knows, with what is usual."""
  config = ConfigDict()
  config.seed = 0
  # A PEFT folder whose LoRA weights training starts from.
  config.init_adapter = config_dict.placeholder(str)
  # A folder, or gs://…, that keeps compiled programs for the next start.
  config.compilation_cache = config_dict.placeholder(str)

  config.model = ConfigDict()
  config.model.path = "minilm"  # a folder, a hub name or an alias
  # What its config.json says, where a config knows: for a dry run without the model.
  config.model.hf_config = ConfigDict()
  config.model.dtype = "float32"  # of computing; "bfloat16" has float32 masters too
  config.model.param_dtype = config_dict.placeholder(str)  # None: frozen as stored
  config.model.scan = False  # layers stacked: compiles faster, runs slower on a CPU
  config.model.remat = "none"  # "full" or "dots" recompute to save memory
  config.model.dropout = config_dict.placeholder(float)  # None: the checkpoint's
  config.model.head_dropout = config_dict.placeholder(float)

  config.data = ConfigDict()
  config.data.task = "headlines"  # or GLUE's, or "next_token"
  config.data.path = config_dict.placeholder(str)  # next_token: a folder of JSON lines
  config.data.max_length = 128  # tokens
  config.data.buckets = 4  # lengths that batches are padded to; each is compiled
  config.data.glue_dir = config_dict.placeholder(str)  # a folder of GLUE's TSVs
  config.data.tfds_dir = config_dict.placeholder(str)  # where TFDS keeps data

  config.lora = ConfigDict()
  # A regular expression, "all-linear", or names: `lorax_flax.jobs.settings.patterns`.
  config.lora.targets = FieldReference("all-linear", field_type=object)
  config.lora.exclude = FieldReference((), field_type=object)
  config.lora.tuned = FieldReference(("classifier",), field_type=object)
  config.lora.rank = 8
  config.lora.alpha = 8.0
  config.lora.use_rslora = False
  config.lora.bias = "none"
  config.lora.dropout = 0.0

  config.train = ConfigDict()
  config.train.epochs = config_dict.placeholder(float)
  config.train.steps = config_dict.placeholder(int)
  config.train.batch_size = 32
  config.train.eval_batch_size = 64
  config.train.accumulation = 1
  config.train.learning_rate = 1e-3
  config.train.schedule = "linear"
  config.train.warmup_steps = config_dict.placeholder(int)
  config.train.warmup_epochs = config_dict.placeholder(float)
  config.train.warmup_fraction = config_dict.placeholder(float)
  config.train.weight_decay = 0.0
  config.train.b1 = 0.9
  config.train.b2 = 0.999
  config.train.eps = 1e-8
  config.train.grad_clip = 1.0
  config.train.label_smoothing = 0.0
  config.train.log_steps = 20
  config.train.save_steps = config_dict.placeholder(int)
  config.train.save_epochs = config_dict.placeholder(float)
  config.train.save_seconds = 60.0
  config.train.on_nonfinite = "stop"  # or "skip" the step that is not finite

  # Devices along each axis; -1 is what is left. The product is their number.
  config.mesh = ConfigDict()
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1
  config.mesh.expert = 1
  return config


def glue(task: str) -> ConfigDict:
  """What all of the LoRA paper's GLUE recipes have in common (its tables 9 and 10).

  AdamW with weight decay 0.1 and no clipping other than the Trainer's default of 1 are
  from the authors' released scripts; the paper gives neither.
  """
  config = base()
  config.data.task = task
  config.data.max_length = 512
  config.lora.targets = QUERY_VALUE
  config.lora.rank = 8
  config.train.schedule = "linear"
  config.train.warmup_fraction = 0.06
  config.train.weight_decay = 0.1
  config.train.log_steps = 50
  return config


def roberta_base(
  task: str, *, batch_size: int, epochs: int, learning_rate: float
) -> ConfigDict:
  """RoBERTa-base on a GLUE task as in the paper's table 9."""
  config = glue(task)
  config.model.path = "FacebookAI/roberta-base"
  config.lora.alpha = 8.0
  config.train.batch_size = batch_size
  config.train.epochs = float(epochs)
  config.train.learning_rate = learning_rate
  return config


def roberta_large(
  task: str, *, batch_size: int, epochs: int, learning_rate: float, max_length: int
) -> ConfigDict:
  """RoBERTa-large on a GLUE task as in the paper's table 9."""
  config = glue(task)
  config.model.path = "FacebookAI/roberta-large"
  config.data.max_length = max_length
  config.lora.alpha = 16.0
  config.train.batch_size = batch_size
  config.train.epochs = float(epochs)
  config.train.learning_rate = learning_rate
  return config


def deberta_xxlarge(
  task: str,
  *,
  batch_size: int,
  epochs: int,
  learning_rate: float,
  weight_decay: float,
  head_dropout: float,
  max_length: int,
) -> ConfigDict:
  """DeBERTa-v2-xxlarge on a GLUE task as in the paper's table 10, but for the rank.

  Rank 16 and alpha 32 are the authors' released scripts': the paper's table 2 counts
  4.7M trained parameters, which is rank 16 on query and value of 48 layers, where the
  rank of its table 10, 8 with alpha 8, makes 2.4M.

  Where the hub has the checkpoint without safetensors or tokenizer.json, transformers'
  save_pretrained writes both into a folder to name as model.path.
  """
  config = glue(task)
  config.model.path = "microsoft/deberta-v2-xxlarge"
  config.model.scan = True  # 48 layers
  config.model.head_dropout = head_dropout
  config.data.max_length = max_length
  config.lora.targets = ".*/attention/(query|value)_proj/kernel"
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.train.batch_size = batch_size
  config.train.epochs = float(epochs)
  config.train.learning_rate = learning_rate
  config.train.warmup_fraction = 0.1
  config.train.weight_decay = weight_decay
  return config


def next_token() -> ConfigDict:
  """What recipes of language models have in common: bfloat16, scanned, recomputed."""
  config = base()
  config.model.dtype = "bfloat16"
  config.model.scan = True
  config.model.remat = "full"
  config.data.task = "next_token"
  config.data.buckets = 2
  config.lora.tuned = ()
  config.mesh.data = 1
  config.mesh.fsdp = -1
  return config


def llama3(
  path: str, *, layers: int, hidden: int, heads: int, mlp: int, learning_rate: float
) -> ConfigDict:
  """Llama 3 on token ids, by the recipe of `instruct`."""
  shape = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": hidden,
    "intermediate_size": mlp,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
  }
  return instruct(path, shape, learning_rate)


def instruct(
  path: str, hf_config: Mapping[str, Any], learning_rate: float
) -> ConfigDict:
  """A language model on token ids: rank 16 on every linear layer but the head.

  All linear layers, alpha 32 with 1/rank scaling and small batches are what "LoRA
  Without Regret" recommends. The learning rate, that stays as it is after the warm-up,
  batches of 16 and gradients clipped at 0.3 are QLoRA's (arXiv 2305.14314) for models
  of this size.
  """
  config = next_token()
  config.model.path = path
  config.model.hf_config = ConfigDict(hf_config)
  config.data.max_length = 2048
  config.lora.targets = "all-linear"
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.train.epochs = 1.0
  config.train.batch_size = 16
  config.train.eval_batch_size = 16
  config.train.learning_rate = learning_rate
  config.train.schedule = "constant"
  config.train.warmup_fraction = 0.03
  config.train.grad_clip = 0.3
  return config


def in_full(config: ConfigDict, learning_rate: float) -> ConfigDict:
  """With every weight trained and no deltas: the same path through the code."""
  config.lora.targets = ()
  config.lora.tuned = ".*"
  config.train.learning_rate = learning_rate
  return config


def choose(config: str, variant: str | None, variants: Mapping[str, Any]) -> Any:
  """The variant of a config that was asked for; "" is the one without a name.

  Raises:
    LoraxError: there is none of that name.
  """
  if (variant or "") in variants:
    return variants[variant or ""]
  named: Sequence[str] = [f"{config}.py:{name}" for name in variants if name]
  raise LoraxError(
    f"{config}.py has no variant {variant!r}. There are: {config}.py, "
    f"{', '.join(named)}"
  )
