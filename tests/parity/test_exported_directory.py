"""An exported directory in transformers, against the model it was exported from.

The whole file also runs under other versions of transformers, in a process of its own: `pytest -m slow`.
"""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import cross_entropy, log_softmax, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.convert.companions import write_companions
from stepaudio_train.convert.text_files import CHAT_TEMPLATES
from stepaudio_train.data.records import AudioPart, Message, Record, TextPart, ToolCall
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.models.step1.attention import alibi_slopes
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.models.step1.weight_map import hf_shapes
from stepaudio_train.tokenizers.text import TextTokenizer, train_text_tokenizer
from stepaudio_train.tokenizers.vocabulary import Special, Vocabulary

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
RELEASED = SHARED / "released" / "tokenizer.model"
GOLDEN = SHARED / "reference" / "golden_tokenizer.json"
TEXT_SIZE = 352
MODEL = Step1Config(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_attention_groups=2,
    vocab_size=TEXT_SIZE + 48,
)  # fmt: skip
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
# Version -> what it needs beside it. The installed one runs everything in the ordinary suite.
OTHER_VERSIONS = {
    "4.48.3": ("tokenizers>=0.21,<0.22", "huggingface_hub>=0.24,<1"),
    "4.57.6": ("tokenizers>=0.22,<0.23", "huggingface_hub>=0.34,<1"),
    "5.23.0": (),
}

needs_released = pytest.mark.skipif(not RELEASED.is_file(), reason="needs the released tokenizer in ../shared/released")
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden ids in ../shared/reference")


@pytest.fixture(scope="module")
def ours() -> Step1ForCausalLM:
    model = Step1ForCausalLM(MODEL)
    weights = InitialWeights(MODEL, seed=3)
    model.load_state_dict({n: weights[n] * (1 if len(s) == 1 else 5) for n, s in hf_shapes(MODEL).items()})
    return model.eval()


@pytest.fixture(scope="module")
def directory(ours, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    train_text_tokenizer(["one two three", "four five six 打开"], TEXT_SIZE, folder / "tokenizer.model")
    ours.save_pretrained(folder)
    write_companions(folder, MODEL, "float32", folder / "tokenizer.model", add_bos=True, card=None)
    return folder


@pytest.fixture(scope="module")
def theirs(directory) -> Iterator:
    return load(directory)


def load(directory: Path, **options):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


def code(model):
    """The module of modeling_step1.py as transformers loaded it."""
    return sys.modules[type(model).__module__]


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(4, MODEL.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """Rows [T_i] of different lengths as one batch."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[index, place], mask[index, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def cache_of(output):
    """What transformers 5.24 calls `cache`, and older versions `past_key_values`."""
    return output.get("cache" if "cache" in type(output).__dataclass_fields__ else "past_key_values")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_logits_are_those_of_the_training_code(ours, directory, implementation):
    ids = random_ids(2, 37)
    expected, model = ours(ids), load(directory, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation and expected.std() > 0.1
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_implementation_can_be_changed_after_loading(ours, directory):
    model = load(directory)
    if "set_attn_implementation" not in dir(model):
        pytest.skip("this version of transformers cannot do it")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(random_ids(1, 9)).logits, ours(random_ids(1, 9)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_padded_rows_equal_single_ones(ours, directory, side, implementation):
    model = load(directory, attn_implementation=implementation)
    rows = [random_ids(1, length, length)[0] for length in (5, 17, 11)]
    batch = padded(rows, side)
    logits = model(**batch).logits
    assert logits.isfinite().all()
    for row, found, mask in zip(rows, logits, batch["attention_mask"].bool(), strict=True):
        torch.testing.assert_close(found[mask], ours(row[None])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_of_padding_alone_gives_no_nan(directory, implementation):
    model = load(directory, attn_implementation=implementation)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    model(random_ids(2, 6), attention_mask=mask).logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_cached_steps_equal_the_whole(theirs):
    batch = padded([random_ids(1, length, length)[0] for length in (9, 14)], "left")
    ids, mask = batch.values()
    whole, past, parts = theirs(**batch).logits, None, []
    for start, stop in [(0, 6), (6, 11), *((i, i + 1) for i in range(11, 14))]:
        output = theirs(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, use_cache=True)
        past = cache_of(output)
        parts.append(output.logits)
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[seen], whole[seen], rtol=0, atol=1e-5)
    assert past.get_seq_length() == 14


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_p": 0.9}], ids=str)
def test_generation_needs_no_cache(theirs, options):
    batch = padded([random_ids(1, length, length)[0] for length in (4, 9)], "left")
    found = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        options = {"do_sample": False, **options}
        found.append(theirs.generate(**batch, max_new_tokens=12, use_cache=use_cache, **options))
    assert torch.equal(*found)


def test_greedy_batch_equals_single_rows_and_the_training_code(ours, theirs):
    rows = [random_ids(1, length, length)[0] for length in (3, 12, 7)]
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    together = theirs.generate(**padded(rows, "left"), **options)[:, 12:]
    for row, found in zip(rows, together, strict=True):
        ids = row[None]
        alone = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(row) :]
        with torch.no_grad():
            for _ in range(10):
                ids = torch.cat([ids, ours(ids)[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(found, alone) and torch.equal(found, ids[0, len(row) :])


def test_generation_ends_at_the_end_of_a_turn(theirs):
    config = theirs.generation_config
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (1, 0, [3])
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.7, 0.9)


# transformers 5.24 has a new name for it that 4.x does not know.
@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(directory, implementation, use_reentrant):
    batch = padded([random_ids(1, length, length)[0] for length in (8, 13)], "left")
    gradients = []
    for checkpointed in (False, True):
        model = load(directory, attn_implementation=implementation).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            assert model.model.gradient_checkpointing
        output = model(**batch, labels=batch["input_ids"], use_cache=True)
        assert (cache_of(output) is None) == checkpointed
        output.loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=1e-6)


def test_gradients_are_those_of_the_training_code(ours, directory):
    model, ids = load(directory), random_ids(2, 15)
    model(ids, labels=ids).loss.backward()
    ours.zero_grad()
    cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = dict(ours.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-5)


@torch.no_grad()
def test_loss_is_shifted_and_shared_out_over_the_items(theirs):
    ids = random_ids(4, 9)
    labels = ids.masked_fill(torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.3, -100)
    losses = -log_softmax(theirs(ids).logits[:, :-1].float(), -1)
    chosen = losses.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0][labels[:, 1:] != -100]
    whole = theirs(ids, labels=labels).loss
    torch.testing.assert_close(whole, chosen.mean())
    count = torch.tensor(len(chosen))
    halves = [theirs(ids[rows], labels=labels[rows], num_items_in_batch=count).loss for rows in ([0, 1], [2, 3])]
    torch.testing.assert_close(sum(halves), whole)
    # transformers' Trainer hands num_items_in_batch only to models whose forward takes any keyword.
    kinds = [p.kind for p in inspect.signature(theirs.forward).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD in kinds


@torch.no_grad()
def test_logits_to_keep_and_hidden_states(theirs):
    ids = random_ids(2, 9)
    output = theirs(ids, output_hidden_states=True)
    for name in ("logits_to_keep", "num_logits_to_keep"):
        torch.testing.assert_close(theirs(ids, **{name: 2}).logits, output.logits[:, -2:], rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs(ids, logits_to_keep=torch.tensor([1, 4])).logits, output.logits[:, [1, 4]])
    assert len(output.hidden_states) == MODEL.num_hidden_layers + 1
    torch.testing.assert_close(theirs.lm_head(output.hidden_states[-1]), output.logits)
    embedded = theirs.get_input_embeddings()(ids)
    torch.testing.assert_close(theirs(inputs_embeds=embedded, return_dict=False)[0], output.logits)


@torch.no_grad()
def test_saved_and_reloaded_is_equal_and_never_tied(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    again = load(tmp_path)
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() == hf_shapes(MODEL).keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)
    torch.testing.assert_close(again(random_ids(1, 9)).logits, theirs(random_ids(1, 9)).logits)
    again.resize_token_embeddings(MODEL.vocab_size + 7)
    assert again(random_ids(1, 9)).logits.shape[-1] == again.lm_head.weight.shape[0] == MODEL.vocab_size + 7
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    with pytest.raises(ValueError, match="never tied"):
        load(tmp_path, tie_word_embeddings=True)


@torch.no_grad()
def test_bfloat16_bias_is_rounded_as_released(ours, directory):
    model = load(directory, torch_dtype=torch.bfloat16)
    slopes = code(model).sqrt_alibi_slopes(48)
    assert torch.equal(slopes, alibi_slopes(48))
    bias = code(model).dense_bias(None, slopes, 600, 600, torch.bfloat16)[0, 0]
    exact = -slopes[0] * torch.arange(600.0).sqrt()
    assert torch.equal(bias[-1].flip(0), exact.bfloat16())
    # The figure that the released code was measured at (largest error at 600 positions, first of 48 heads).
    assert 0.05 < (bias[-1].flip(0).float() - exact).abs().max() < 0.07
    ids = random_ids(1, 20)
    loss = model(ids, labels=ids).loss
    assert loss.dtype == torch.float32
    expected = cross_entropy(ours(ids)[0, :-1], ids[0, 1:])
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_scores_are_the_dense_bias(theirs, monkeypatch):
    """Forward only, as FlexAttention is on a CPU, and uncompiled."""
    monkeypatch.setattr(code(theirs), "_compiled_flex", lambda: flex_attention)
    check_flex(code(theirs), torch.device("cpu"), (130,))


@pytest.mark.gpu
def test_flex_on_a_gpu(theirs):
    check_flex(code(theirs), torch.device("cuda"), (17, 130, 300))


def check_flex(module, device: torch.device, lengths: tuple[int, ...]) -> None:
    slopes = module.sqrt_alibi_slopes(6, device)
    for length in lengths:
        noise = torch.Generator().manual_seed(length)
        query, key, value = (torch.randn(2, h, length, 16, generator=noise).to(device) for h in (6, 2, 2))
        for keep in (None, torch.arange(length, device=device)[None] >= torch.tensor([[0], [9]], device=device)):
            mask = module.block_mask(keep, length, device)
            found = module.flex_sqrt_alibi(query, key, value, slopes, mask)
            bias = module.dense_bias(keep, slopes, length, length, torch.float32)
            repeated = (tensor.repeat_interleave(3, dim=1) for tensor in (key, value))
            expected = scaled_dot_product_attention(query, *repeated, attn_mask=bias)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_cannot_be_computed_is_refused(theirs):
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="must be"):
        theirs(ids, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="static"):
        theirs.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static")
    with pytest.raises(ValueError, match="no attention weights"):
        theirs(ids, output_attentions=True)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        theirs()


@pytest.fixture(scope="module", params=["chat", "tts", "tts_bos"])
def released(request, tmp_path_factory):
    """The released tokenizer as it is exported with a template, and the template's name."""
    if not RELEASED.is_file():
        pytest.skip("needs the released tokenizer in ../shared/released")
    folder = tmp_path_factory.mktemp("released")
    model = Step1Config(vocab_size=74752)
    template, add_bos = CHAT_TEMPLATES[request.param], request.param != "tts"
    write_companions(folder, model, "bfloat16", RELEASED, chat_template=template, add_bos=add_bos, card=None)
    return AutoTokenizer.from_pretrained(folder), request.param


def test_released_ids(released):
    tokenizer, template = released
    assert len(tokenizer) == 74752
    for text, ids in [
        ("assistant\n", [15886, 78]),
        ("<|BOT|>human\n你好<|EOT|><|BOT|>assistant\n", [4, 28504, 78, 1027, 922, 3, 4, 56446, 78]),
        ("<audio_0><audio_5119>", [65536, 70655]),
    ]:
        assert tokenizer.encode(text) == [1] * (template != "tts") + ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@needs_golden
def test_golden_ids(released):
    """The released program encodes every turn by itself; so does this test, with the texts read off the golden ids."""
    tokenizer, template = released
    bos = template != "tts"
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    prompts = golden[f"transformers4.48.3_add_bos_{bos}"]
    assert len(prompts) == 4
    for ids in prompts.values():
        rebuilt, turn = [1], []
        for index in [*ids[1:], None]:
            if index in (Special.BOT, Special.EOT, None):
                text = tokenizer.decode([i for i in turn if i != Special.BOS], skip_special_tokens=False)
                role, newline, content = text.partition("\n")
                if newline:
                    rebuilt += tokenizer.encode(role.strip() + "\n")
                    line_break = tokenizer.encode("\n")
                    rebuilt += tokenizer.encode("\n" + content)[len(line_break) :] if content else []
                rebuilt += [index] if index is not None else []
                turn = []
            else:
                turn.append(index)
        assert rebuilt == ids
    if bos:
        assert tokenizer.encode(golden["chat_text"]) == golden["chat_ids_stepaudio_py"]


def test_served_conversations_have_the_ids_that_were_trained_on(released):
    tokenizer, template = released
    renderer = Renderer(Vocabulary(65536), TextTokenizer.from_file(RELEASED))
    audio = "<audio_0><audio_1><audio_1024><audio_1025><audio_1026>"
    messages = (
        Message("system", (TextPart("Answer briefly. 简短回答。"),)),
        Message("human", (TextPart("你好, two words\nand a line"),)),
        Message("assistant", (TextPart(" a space first"),)),
        Message("human", (AudioPart("", tokens=audio),)),
        Message("assistant", (AudioPart("", tokens=audio),)),
    )
    turns = [
        {"role": message.role.replace("human", "user"), "content": part.tokens if part.type == "audio" else part.text}
        for message in messages
        for part in message.content
    ]
    sample = TokenSample(Record("one", messages))
    trained = renderer.render_chat(sample, template).ids.tolist()
    assert tokenizer.apply_chat_template(turns, return_dict=False) == trained
    served = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
    assert served == renderer.render_chat_prompt(sample, template).tolist() == trained[: len(served)]


def test_served_tools_have_the_ids_that_were_trained_on(released):
    tokenizer, template = released
    renderer = Renderer(Vocabulary(65536), TextTokenizer.from_file(RELEASED))
    schema = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    arguments = {"a": 7, "为": "二"}
    asked = [Message("system", (TextPart("be brief"),)), Message("human", (TextPart("what is 7 and 2"),))]
    called = Message("assistant", (TextPart("wait"), ToolCall("add", arguments)))
    messages = (*asked, called, Message("tool", (TextPart("9"),)), Message("assistant", (TextPart("nine"),)))
    calls = [{"function": {"name": "add", "arguments": arguments}}]
    call = {"role": "assistant", "content": "wait", "tool_calls": calls}
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 7 and 2"}, call]
    turns += [{"role": "tool", "content": "9"}, {"role": "assistant", "content": "nine"}]
    for first in (0, 1):  # with a system turn before the tools, and without
        sample = TokenSample(Record("one", messages[first:], tools=(schema,)))
        trained = renderer.render_chat(sample, template).ids.tolist()
        assert tokenizer.apply_chat_template(turns[first:], tools=[schema], return_dict=False) == trained
        for end in (len(turns) - 1, 2):
            given, options = turns[first:end], {"tools": [schema], "return_dict": False}
            served = tokenizer.apply_chat_template(given, add_generation_prompt=True, **options)
            prompt = TokenSample(Record("one", messages[first:end], tools=(schema,)))
            assert served == renderer.render_chat_prompt(prompt, template).tolist() == trained[: len(served)]


@needs_golden
def test_released_prompts_have_the_golden_ids(released):
    """Their turns, read off the golden ids, by the chat template."""
    tokenizer, template = released
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    of_template = {
        "chat": {"stepaudio.py": golden["chat_ids_stepaudio_py"]},
        "tts": golden["transformers4.48.3_add_bos_False"],
        "tts_bos": golden["transformers4.48.3_add_bos_True"],
    }
    for ids in of_template[template].values():
        text = tokenizer.decode([index for index in ids if index != Special.BOS], skip_special_tokens=False)
        opened = [turn.removesuffix("<|EOT|>").partition("\n") for turn in text.split("<|BOT|>")[1:-1]]
        turns = [{"role": role.strip(), "content": content} for role, _, content in opened]
        assert tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) == ids


def test_small_tokenizers_name_every_audio_id(directory):
    tokenizer, training = (
        AutoTokenizer.from_pretrained(directory),
        TextTokenizer.from_file(directory / "tokenizer.model"),
    )
    assert len(tokenizer) == MODEL.vocab_size and training.size == TEXT_SIZE
    assert tokenizer.encode("<audio_0> one<audio_47>") == [1, TEXT_SIZE, *tokenizer.encode(" one")[1:], TEXT_SIZE + 47]
    for text in ("one two 打开", "tab\tand ÄÖ\nline", "<|BOT|>human\nfour<|EOT|>", "a  b  "):
        assert tokenizer.encode(text) == training.encode(text, add_bos=True)
        assert tokenizer.decode(training.encode(text), skip_special_tokens=False) == text
    assert tokenizer.padding_side == "left"
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert specials == (1, 2, 0, 0) and tokenizer.model_max_length == MODEL.max_seq_len


@pytest.mark.slow
@pytest.mark.parametrize("version", OTHER_VERSIONS)
def test_other_versions_of_transformers(version, tmp_path):
    """This very file, in a process that finds that version first."""
    packages = [f"transformers=={version}", *OTHER_VERSIONS[version]]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), *packages]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"cannot install {' '.join(packages)}: {installed.stderr.strip().splitlines()[-1]}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    asked = subprocess.run(
        [sys.executable, "-c", "import transformers; print(transformers.__version__)"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert asked.stdout.strip() == version
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
