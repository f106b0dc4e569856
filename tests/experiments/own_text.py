"""A tiny decoder with a tokenizer and a chat template, and text that can be learnt."""

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from experiments.cli import config_flag
from tests.experiments import token_ids

# With transformers' own marks around what the assistant says.
TEMPLATE = (
  "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
  "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}"
  "{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}{% endif %}"
  "{{ '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANSWER = ({"role": "assistant", "content": "yes"},)


def decoder(folder, template=TEMPLATE, width=16):
  """Saves a random Llama and its tokenizer."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<|end|>", "<|start|>", "<|begin|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator([" ".join(NUMBERS)] * 3, trainer)
  begin = backend.token_to_id("<|begin|>")
  backend.post_processor = processors.TemplateProcessing(
    single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>"
  )
  tokenizer.chat_template = template
  tokenizer.save_pretrained(folder)
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=width,
    intermediate_size=width * 3 // 2,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    initializer_range=0.3,
    tie_word_embeddings=False,
  )
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  return transformers.AutoTokenizer.from_pretrained(folder)


def counting(number):
  """The count from a number to that after the next, and the number."""
  names = [NUMBERS[(number + i) % len(NUMBERS)] for i in range(3)]
  return names[0], " ".join(names)


def chats(count, first=0):
  for number in range(first, first + count):
    messages = []
    for turn in range(1 + number % 2):
      asked, said = counting(number + turn)
      messages.append({"role": "user", "content": asked})
      messages.append({"role": "assistant", "content": said})
    yield {"messages": messages, "note": "not read"}


def completions(count, first=0):
  for number in range(first, first + count):
    asked, said = counting(number)
    yield {"prompt": f"{asked}:", "completion": f" {said}"}


def documents(count, first=0):
  for number in range(first, first + count):
    yield {"text": ", ".join(counting(number + i)[1] for i in range(number % 3 + 1))}


def write(folder, rows, count=18, held_out=5):
  return token_ids.write(folder, rows(count), rows(held_out, 30))


def shrunk(spec, base, data, **changes):
  """The settings of a config for the tiny decoder."""
  config = config_flag.load(spec)
  values = {
    "model.path": str(base),
    "data.path": str(data),
    "data.max_length": 64,
    "data.buckets": 1,
    "data.prompts": 0,
    "lora.rank": 3,
    "train.epochs": None,
    "train.steps": 12,
    "train.batch_size": 4,
    "train.eval_batch_size": 4,
    "train.learning_rate": 0.02,
    "train.warmup_fraction": 0.0,
    "train.log_steps": 1,
  }
  return token_ids.changed(config, values | changes)
