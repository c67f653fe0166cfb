"""A session of the LIVE protocol decides and says what a plain loop over transformers does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jstream.config import DecoderConfig, ModelConfig, SiglipConfig
from jstream.data.video import Frame
from jstream.model import Model
from jstream.models.video_lm import abstract_params, run
from jstream.protocols import make_protocol, make_tokenizer
from jstream.protocols.live import PUBLISHED
from jstream.streaming.session import Session
from jstream.weights.hf import save_hf
from tests.test_live import TEXTS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUERIES = {3: "What is that?", 9: "And now?"}
NUM_FRAMES, LONGEST = 24, 7
THRESHOLDS = (0.3, 0.6, 0.9)  # of p(silence), below which the model speaks


def make_model(seed: int) -> Model:
    """A random model that is often silent, and ends its replies after some tokens."""
    tokenizer = make_tokenizer(PUBLISHED, TEXTS, 420)
    config = ModelConfig(
        SiglipConfig(image_size=32, patch_size=8, width=16, num_layers=1, num_heads=2, mlp_dim=32, grid=1),
        DecoderConfig(
            vocab_size=tokenizer.vocab_size, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
            mlp_dim=48, rope_theta=1e4,
        ),
    )  # fmt: skip
    protocol = make_protocol(PUBLISHED, tokenizer, config.vision.tokens_per_frame)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(
        rng.normal(0, leaf.shape[0] ** -0.5 if leaf.ndim > 1 else 0.5, leaf.shape), jnp.float32
    )
    params = jax.tree.map(draw, abstract_params(config))
    # one direction of the hidden states in favour of the comma, another of the end
    head, norm = np.array(params["decoder"]["lm_head"]["kernel"]), np.ones(32, np.float32)
    head[:, [protocol.silence_id, protocol.end_id]] *= [6.0, 4.0]
    params["decoder"]["lm_head"]["kernel"], params["decoder"]["norm"]["scale"] = jnp.asarray(head), jnp.asarray(norm)
    return Model(config, params, protocol)


def reference_loop(llm, embed_frame, protocol, frames, least):
    """What VideoLLM-online's demo does (showlab/videollm-online, `demo/inference.py`): (spoke, reply) a frame; and
    p(silence) at every frame."""
    embed, past, last, events, silences = llm.get_input_embeddings(), None, list(protocol.prefix), [], []
    encode = protocol.tokenizer.encode_template
    for index, frame in enumerate(frames):
        inputs = torch.cat([embed(torch.tensor([last])), embed_frame(frame)], dim=1)
        out = llm(inputs_embeds=inputs, past_key_values=past, use_cache=True)
        past, scores = out.past_key_values, out.logits[0, -1].softmax(-1)
        silences.append(float(scores[protocol.silence_id]))
        if scores[protocol.silence_id] < least:
            scores[protocol.silence_id] = 0
        query = QUERIES.get(index)
        if query is None and int(scores.argmax()) == protocol.silence_id:
            last = [protocol.silence_id]
            events.append((False, None))
            continue
        opening = encode("]\nAssistant:" if query is None else f"]\nUser: {query}\nAssistant:")
        inputs, reply = embed(torch.tensor([opening])), []
        while len(reply) < LONGEST:
            out = llm(inputs_embeds=inputs, past_key_values=past, use_cache=True)
            past, token = out.past_key_values, int(out.logits[0, -1].argmax())
            if token == protocol.end_id:
                break
            reply.append(token)
            inputs = embed(torch.tensor([[token]]))
        cut = reply[-1:] if len(reply) == LONGEST else []
        last = [*cut, protocol.end_id, *encode("\n[")]
        events.append((True, protocol.decode_reply(reply)))
    return events, silences


def test_sessions_equal_the_published_loop(tmp_path):
    spoken = silent = ended = 0
    for seed in range(5):
        model = make_model(seed)
        c = model.config.decoder
        record = transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.width, num_hidden_layers=c.num_layers, head_dim=c.head_dim,
            num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, intermediate_size=c.mlp_dim,
            rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=False, attention_bias=False,
            architectures=["LlamaForCausalLM"],
        ).to_dict()  # fmt: skip
        save_hf(tmp_path / str(seed), "llama", model.config, model.params, record)
        llm = transformers.LlamaForCausalLM.from_pretrained(tmp_path / str(seed), dtype=torch.float32).eval()
        embed = jax.jit(lambda image, model=model: run(model.config, model.params, image, method="embed_frames"))
        embed_frame = lambda image, embed=embed: torch.tensor(np.asarray(embed(image[None])))

        rng = np.random.default_rng(seed)
        images = list(rng.integers(0, 256, (NUM_FRAMES, 32, 32, 3), np.uint8))
        session = Session(model, capacity=1024, fps=2.0, max_new_tokens=LONGEST)
        for least in THRESHOLDS:
            session.threshold = 1 - least
            session.reset()
            got, silences = [], []
            for index, image in enumerate(images):
                if index in QUERIES:
                    session.ask(QUERIES[index])
                event = session.see(Frame(index / 2, image))
                got.append((event.state == "response", event.text))
                silences.append(event.probs["silence"])
            with torch.no_grad():
                expected, numbers = reference_loop(llm, embed_frame, model.protocol, images, least)
            assert got == expected, (seed, least)
            np.testing.assert_allclose(silences, numbers, atol=1e-4)
            spoken += sum(spoke for spoke, _ in got)
            silent += sum(not spoke for spoke, _ in got)
            ended += sum(len(model.protocol.encode_reply(text or "")) < LONGEST for spoke, text in got if spoke)
    assert min(spoken, silent, ended) > 20, (spoken, silent, ended)
