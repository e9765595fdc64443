"""The named question sets: where each lies on the hub, under which licence, and whose it is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from lmrl_env.questions.question_set import Columns


class Citation(NamedTuple):
    """A publication.

    Attributes:
        authors: family names.
        title: of the publication.
        year: in which it appeared.
        arxiv: its id there, or None where it is elsewhere.
    """

    authors: str
    title: str
    year: int
    arxiv: str | None = None


class NamedSet(NamedTuple):
    """A question set that is known by name.

    Attributes:
        hub: id of the data set on the Hugging Face hub.
        split: of the data set.
        licence: of the questions, as their publishers state it.
        citation: whom to cite.
        columns: where question, answer and id stand; a dot leads into a nested column.
        config: of the data set, where it has several.
        note: what a reader should know of this copy.
    """

    hub: str
    split: str
    licence: str
    citation: Citation
    columns: Columns = Columns("problem")
    config: str | None = None
    note: str = ""


_MATH = Citation(
    "Hendrycks, Burns, Kadavath, Arora, Basart, Tang, Song, Steinhardt",
    "Measuring Mathematical Problem Solving With the MATH Dataset",
    2021,
    "2103.03874",
)
_MAA = "none stated; contest problems of the Mathematical Association of America"

NAMED_SETS: Mapping[str, NamedSet] = MappingProxyType(
    {
        "orz-57k": NamedSet(
            hub="Open-Reasoner-Zero/orz_math_57k_collection",
            split="train",
            licence="MIT",
            citation=Citation(
                "Hu, Zhang, Han, Jiang, Zhang, Shum",
                "Open-Reasoner-Zero: An Open Source Approach to Scaling Up Reinforcement Learning "
                "on the Base Model",
                2025,
                "2503.24290",
            ),
            columns=Columns("0.value", "1.ground_truth.value"),
        ),
        "math-12k": NamedSet(
            hub="hiyouga/math12k",
            split="train",
            licence="MIT",
            citation=_MATH,
            note="MATH without the 500 questions of math500.",
        ),
        "math-lvl3to5": NamedSet(
            hub="axon-rl/MATH-lvl3to5-8k",
            split="train",
            licence="MIT",
            citation=Citation(
                "Zeng, Huang, Liu, Liu, He, Ma, He",
                "SimpleRL-Zoo: Investigating and Taming Zero Reinforcement Learning for Open Base "
                "Models in the Wild",
                2025,
                "2503.18892",
            ),
            columns=Columns("question", "gt_answer"),
            note="8,523 questions of MATH, levels 3 to 5, none of them in math500; the file "
            "simplelr_qwen_level3to5/train.parquet of hkust-nlp/SimpleRL-Zoo-Data is a copy with "
            "levels.",
        ),
        "gsm8k": NamedSet(
            hub="openai/gsm8k",
            split="train",
            config="main",
            licence="MIT",
            citation=Citation(
                "Cobbe, Kosaraju, Bavarian, Chen, Jun, Kaiser, Plappert, Tworek, Hilton, Nakano, "
                "Hesse, Schulman",
                "Training Verifiers to Solve Math Word Problems",
                2021,
                "2110.14168",
            ),
            columns=Columns(),
            note="Evaluate on gsm8k:split=test.",
        ),
        "asdiv": NamedSet(
            hub="axon-rl/ASDIV-2k",
            split="train",
            licence="CC BY-NC 4.0",
            citation=Citation(
                "Miao, Liang, Su",
                "A Diverse Corpus for Evaluating and Developing English Math Word Problem Solvers",
                2020,
                "2106.15772",
            ),
            note="1,788 of its questions, those that the paper trains on. Not for commercial use.",
        ),
        "aime24": NamedSet(
            hub="HuggingFaceH4/aime_2024",
            split="train",
            licence=_MAA,
            citation=Citation("MAA", "American Invitational Mathematics Examination", 2024),
        ),
        "amc": NamedSet(
            hub="AI-MO/aimo-validation-amc",
            split="train",
            licence=_MAA,
            citation=Citation("MAA", "American Mathematics Competitions: AMC 12", 2023),
            note="The 83 questions of 2022 and 2023 whose answer is a whole number.",
        ),
        "math500": NamedSet(
            hub="HuggingFaceH4/MATH-500",
            split="test",
            licence="MIT",
            citation=Citation(
                "Lightman, Kosaraju, Burda, Edwards, Baker, Lee, Leike, Schulman, Sutskever, Cobbe",
                "Let's Verify Step by Step",
                2023,
                "2305.20050",
            ),
            columns=Columns("problem", "answer", "unique_id"),
        ),
        "minerva": NamedSet(
            hub="math-ai/minervamath",
            split="test",
            licence="none stated; texts of MIT OpenCourseWare",
            citation=Citation(
                "Lewkowycz, Andreassen, Dohan, Dyer, Michalewski, Ramasesh, Slone, Anil, Schlag, "
                "Gutman-Solo, Wu, Neyshabur, Gur-Ari, Misra",
                "Solving Quantitative Reasoning Problems with Language Models",
                2022,
                "2206.14858",
            ),
            columns=Columns(),
        ),
        "olympiad-bench": NamedSet(
            hub="Hothan/OlympiadBench",
            split="train",
            config="OE_TO_maths_en_COMP",
            licence="MIT",
            citation=Citation(
                "He, Luo, Bai, Hu, Thai, Shen, Hu, Han, Huang, Zhang, Liu, Qi, Liu, Sun",
                "OlympiadBench: A Challenging Benchmark for Promoting AGI with Olympiad-Level "
                "Bilingual Multimodal Scientific Problems",
                2024,
                "2402.14008",
            ),
            columns=Columns("question", "final_answer"),
            note="Open-ended mathematics in English, text only.",
        ),
        "dapo-math-17k": NamedSet(
            hub="open-r1/DAPO-Math-17k-Processed",
            split="train",
            config="all",
            licence="Apache-2.0",
            citation=Citation(
                "Yu et al.",
                "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
                2025,
                "2503.14476",
            ),
            columns=Columns("prompt", "solution"),
            note="The questions of BytedTsinghua-SIA/DAPO-Math-17k, once each and without prompt.",
        ),
        "aime25": NamedSet(
            hub="math-ai/aime25",
            split="test",
            licence=_MAA,
            citation=Citation("MAA", "American Invitational Mathematics Examination", 2025),
        ),
    }
)
"""The question sets that ``load_questions`` knows by name."""
