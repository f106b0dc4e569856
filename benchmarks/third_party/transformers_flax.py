"""Flax models of transformers 4, which version 5 dropped.

Its T5 calls `jnp.clip(a_max=)`, which JAX no longer has, and is not here.
"""

import jax
import jax.numpy as jnp
import transformers as hf

from benchmarks.third_party.check import Model, random_like

SIZES = {
  "vocab_size": 97,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 48,
  "max_position_embeddings": 24,
  "pad_token_id": 0,
}
PAIR = {
  "vocab_size": 97,
  "d_model": 32,
  "encoder_layers": 2,
  "decoder_layers": 2,
  "encoder_attention_heads": 4,
  "decoder_attention_heads": 4,
  "encoder_ffn_dim": 48,
  "decoder_ffn_dim": 48,
  "max_position_embeddings": 24,
}
IMAGE = {"image_size": 16, "patch_size": 8}
IDS = jax.random.randint(jax.random.key(0), (2, 9), 3, 97)
PIXELS = jax.random.normal(jax.random.key(0), (2, 3, 16, 16))


def _model(module, config, *inputs) -> Model:
  model = module(config, _do_init=False)
  params = random_like(model.params_shape_tree)
  return Model(lambda p, *xs: model(*xs, params=p)[0], params, inputs)


def albert():
  return _model(hf.FlaxAlbertModel, hf.AlbertConfig(**SIZES, embedding_size=16), IDS)


def bart():
  return _model(hf.FlaxBartForConditionalGeneration, hf.BartConfig(**PAIR), IDS)


def beit():
  return _model(hf.FlaxBeitModel, hf.BeitConfig(**SIZES, **IMAGE), PIXELS)


def bert():
  return _model(hf.FlaxBertForMaskedLM, hf.BertConfig(**SIZES), IDS)


def big_bird():
  config = hf.BigBirdConfig(**SIZES, attention_type="original_full")
  return _model(hf.FlaxBigBirdModel, config, IDS)


def big_bird_sparse():
  config = hf.BigBirdConfig(
    **SIZES | {"max_position_embeddings": 64}, block_size=4, num_random_blocks=1
  )
  ids = jax.random.randint(jax.random.key(0), (2, 48), 3, 97)
  return _model(hf.FlaxBigBirdModel, config, ids)


def blenderbot():
  config = hf.BlenderbotConfig(**PAIR)
  return _model(hf.FlaxBlenderbotForConditionalGeneration, config, IDS)


def bloom():
  return _model(hf.FlaxBloomForCausalLM, hf.BloomConfig(**SIZES), IDS)


def clip():
  text, image = hf.CLIPTextConfig(**SIZES), hf.CLIPVisionConfig(**SIZES, **IMAGE)
  model = hf.FlaxCLIPModel(
    hf.CLIPConfig.from_text_vision_configs(text, image), _do_init=False
  )

  def fn(params, ids, pixels):
    return model(ids, pixels, params=params).logits_per_text

  return Model(fn, random_like(model.params_shape_tree), (IDS, PIXELS))


def dinov2():
  return _model(hf.FlaxDinov2Model, hf.Dinov2Config(**SIZES, **IMAGE), PIXELS)


def distilbert():
  config = hf.DistilBertConfig(**SIZES, hidden_dim=48)
  return _model(hf.FlaxDistilBertForMaskedLM, config, IDS)


def electra():
  config = hf.ElectraConfig(**SIZES, embedding_size=16)
  return _model(hf.FlaxElectraForPreTraining, config, IDS)


def gemma():
  config = hf.GemmaConfig(**SIZES, head_dim=8, num_key_value_heads=2)
  return _model(hf.FlaxGemmaForCausalLM, config, IDS)


def gpt2():
  return _model(hf.FlaxGPT2LMHeadModel, hf.GPT2Config(**SIZES), IDS)


def gpt_neo():
  config = hf.GPTNeoConfig(
    **SIZES, num_layers=2, attention_types=[[["global", "local"], 1]]
  )
  return _model(hf.FlaxGPTNeoForCausalLM, config, IDS)


def gptj():
  return _model(hf.FlaxGPTJForCausalLM, hf.GPTJConfig(**SIZES, rotary_dim=4), IDS)


def llama():
  config = hf.LlamaConfig(**SIZES, num_key_value_heads=2)
  return _model(hf.FlaxLlamaForCausalLM, config, IDS)


def mistral():
  config = hf.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
  return _model(hf.FlaxMistralForCausalLM, config, IDS)


def opt():
  config = hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16)
  return _model(hf.FlaxOPTForCausalLM, config, IDS)


def pegasus():
  return _model(hf.FlaxPegasusForConditionalGeneration, hf.PegasusConfig(**PAIR), IDS)


def regnet():
  config = hf.RegNetConfig(
    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=4
  )
  return _image(hf.FlaxRegNetForImageClassification, config)


def resnet():
  config = hf.ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck"
  )
  return _image(hf.FlaxResNetForImageClassification, config)


def roberta():
  return _model(hf.FlaxRobertaForSequenceClassification, hf.RobertaConfig(**SIZES), IDS)


def roformer():
  return _model(hf.FlaxRoFormerModel, hf.RoFormerConfig(**SIZES), IDS)


def vit():
  config = hf.ViTConfig(**SIZES, **IMAGE)
  return _model(hf.FlaxViTForImageClassification, config, PIXELS)


def wav2vec2():
  config = hf.Wav2Vec2Config(
    **SIZES, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 3),
    num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    do_stable_layer_norm=True, feat_extract_norm="layer",
  )  # fmt: skip
  return _model(hf.FlaxWav2Vec2Model, config, jnp.sin(jnp.arange(400.0))[None])


def whisper():
  config = hf.WhisperConfig(
    **PAIR, num_mel_bins=6, max_source_positions=10, max_target_positions=24,
    decoder_start_token_id=3,
  )  # fmt: skip
  mel = jax.random.normal(jax.random.key(0), (2, 6, 20))
  return _model(hf.FlaxWhisperForConditionalGeneration, config, mel, IDS)


def xglm():
  config = hf.XGLMConfig(
    vocab_size=97, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4
  )
  return _model(hf.FlaxXGLMForCausalLM, config, IDS)


def _image(module, config) -> Model:
  """A classifier with batch statistics, which stay as they are."""
  model = module(config)

  def fn(params, pixels, statistics):
    variables = {"params": params, "batch_stats": statistics}
    return model(pixels, params=variables)[0]

  return Model(fn, model.params["params"], (PIXELS, model.params["batch_stats"]))


MODELS = {
  build.__name__: build
  for build in (
    albert, bart, beit, bert, big_bird, big_bird_sparse, blenderbot, bloom, clip,
    dinov2, distilbert, electra, gemma, gpt2, gpt_neo, gptj, llama, mistral,
    opt, pegasus, regnet, resnet, roberta, roformer, vit, wav2vec2, whisper, xglm,
  )
}  # fmt: skip
