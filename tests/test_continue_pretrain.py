import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from paper.scripts import load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmrl_env.errors import ConfigurationError, QuestionError
from lmrl_env.tokenizer import TINY_MODEL

program = load("continue_pretrain")
ROWS = [
    *({"problem": f"Tom has {i} apples.", "solution": f"It is {i}."} for i in range(2, 40)),
    {"problem": "What?", "solution": None},
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def settings(tmp_path, text):
    return program.Settings(
        model="tiny", text=str(text), columns="problem,solution", separator=" ",
        out=tmp_path / "model", sequence_length=32, batch_size=4, micro_batch_size=2, epochs=1,
        lr=1e-3, warmup_steps=2, schedule="cosine", weight_decay=0.0, seed=0, dtype="float32",
        checkpoint_every=0,
    )  # fmt: skip


def write_gz(path):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write"), [("text.jsonl.gz", write_gz), ("text.parquet", write_parquet)]
)
def test_columns_are_joined_and_rows_with_an_empty_one_left_out(name, write, tmp_path):
    write(tmp_path / name)
    documents, left_out = program.read_documents(
        str(tmp_path / name), ["problem", "solution"], "\n"
    )
    assert documents[0] == "Tom has 2 apples.\nIt is 2."
    assert (len(documents), left_out) == (38, 1)


def test_blank_lines_part_the_documents_of_a_text_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("One.\nStill one.\n\n\n\nTwo.\n")
    assert program.read_documents(str(path), ["text"], "\n") == (["One.\nStill one.", "Two."], 0)


def test_a_missing_column_or_file_is_named(text, tmp_path):
    with pytest.raises(QuestionError, match="no column 'text': its columns are"):
        program.read_documents(str(text), ["text"], "\n")
    with pytest.raises(QuestionError, match=r"cannot read .*nowhere\.txt"):
        program.read_documents(str(tmp_path / "nowhere.txt"), ["text"], "\n")


def test_documents_end_with_the_eos_and_fill_whole_sequences():
    packed = program.pack([[1, 2], [3], [4, 5, 6]], eos=9, length=4, seed=0)
    order = np.random.default_rng(0).permutation(3)
    stream = [token for i in order for token in ([1, 2, 9], [3, 9], [4, 5, 6, 9])[i]]
    assert packed.tolist() == [stream[:4], stream[4:8]]


def test_the_learning_rate_rises_and_falls(settings):
    rates = [program.learning_rate(step, 6, settings) for step in range(6)]
    half = np.sqrt(0.5)
    expected = [0.5, 1, 1, 0.5 + 0.5 * half, 0.5, 0.5 - 0.5 * half]
    assert rates == pytest.approx([1e-3 * value for value in expected])
    constant = replace(settings, schedule="constant")
    assert program.learning_rate(5, 6, constant) == 1e-3


def test_every_epoch_reads_each_sequence_once(settings):
    batches = program.schedule_batches(8, replace(settings, epochs=2), ranks=1)
    assert batches.shape == (4, 4)
    assert sorted(batches[:2].flatten()) == sorted(batches[2:].flatten()) == list(range(8))
    assert batches[:2].tolist() != batches[2:].tolist()


def test_batches_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigurationError, match="multiple of --micro-batch-size x ranks, 2 x 3"):
        program.schedule_batches(8, settings, ranks=3)
    with pytest.raises(ConfigurationError, match="fills 3 sequences of 32 tokens"):
        program.schedule_batches(3, settings, ranks=1)


def weights(settings):
    program.run(settings)
    return load_file(settings.out / "model.safetensors")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_seed_makes_one_model_which_loads_and_fits_the_text(settings):
    first = weights(settings)
    assert same(first, weights(replace(settings, out=settings.out.with_name("again"))))
    assert not same(first, weights(replace(settings, out=settings.out.with_name("b"), seed=1)))
    card = (settings.out / "README.md").read_text()
    assert "38 documents of the columns\nproblem and solution" in card
    base, trained = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (TINY_MODEL, settings.out)
    )
    documents, _ = program.read_documents(settings.text, ["problem", "solution"], " ")
    tokenizer = program.AutoTokenizer.from_pretrained(settings.out)
    ids = torch.tensor([tokenizer(documents[0])["input_ids"]])
    with torch.no_grad():
        assert trained(ids, labels=ids).loss < base(ids, labels=ids).loss
    assert not list(Path(settings.out.parent).glob("*.unfinished"))


def test_a_run_that_was_broken_off_goes_on_to_the_same_model(settings, monkeypatch):
    whole = weights(settings)
    again = replace(settings, out=settings.out.with_name("again"), checkpoint_every=2)
    whole_too = replace(again, out=settings.out.with_name("whole"))
    optimise, taken = program.optimise, []

    def breaks_off(*arguments):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(1)
        return optimise(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(program, "optimise", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            program.run(again)
    assert not again.out.exists()
    with pytest.raises(ConfigurationError, match="holds a run with other settings"):
        program.run(replace(again, lr=1e-4))
    unfinished = program.checkpoint_folder(again.out)
    unfinished.rename(unfinished.with_name(f"{unfinished.name}.partial"))  # its last moment
    assert same(whole, weights(again))
    assert same(whole, weights(whole_too))


def test_a_folder_that_exists_is_not_overwritten(settings):
    settings.out.mkdir()
    with pytest.raises(ConfigurationError, match="exists: name a new folder"):
        program.run(settings)
