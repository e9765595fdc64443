"""Extraction of answers, and equality of mathematical answers."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmrl_env.errors import UnknownNameError
from lmrl_env.templates import TEMPLATES
from lmrl_env.verifiers import (
    answer_tag_math,
    boxed_math,
    math_answer,
    math_equal,
    verdict_at_once,
    verifier_for,
)

SAME = [
    # numbers
    ("12", "12.0"),
    ("012", "12"),
    ("-0", "0"),
    ("+7", "7"),
    ("1,080", "1080"),
    (r"32,\!348", "32348"),
    (r"10\,000", "10000"),
    ("1{,}080.50", "1080.5"),
    ("0.5", r"\frac{1}{2}"),
    (r"\dfrac12", "0.5"),
    ("6/4", r"\frac{3}{2}"),
    (r"3\frac{1}{2}", "3.5"),
    ("3 1/2", "7/2"),
    (r"\frac{-1}{1997}", r"-\frac{1}{1997}"),
    ("\N{MINUS SIGN}3", "-3"),
    (r"3.61 \times 10^{-10}", "3.61e-10"),
    ("10^3", "1000"),
    # what stands around a number
    ("12.", "12"),
    ("**12**", "12"),
    ("**12", "12"),
    ("$12$", "12"),
    ("$12", "12"),
    (r"\$18.90", "18.9"),
    (r"\(12\)", "12"),
    (r"\text{12}", "12"),
    ("The final answer is: 12.", "12"),
    ("x = 12", "12"),
    ("12", "x=12"),
    (r"\approx 8.24 \text{ mph}", "8.24"),
    # units
    ("12 apples", "12"),
    ("12", r"12\text{ cm}^2"),
    ("15 square centimeters", r"15\mbox{ cm}^2"),
    ("5 hrs", r"5 \text{ hours}"),
    ("12 dollars", r"\$12"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", r"90 \text{ degrees}"),
    (r"12\%", "12"),
    ("0.12", r"12\%"),
    ("12%", "0.12"),
    ("2516", "2516_8"),
    # expressions
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("0.5x", r"\frac{x}{2}"),
    (r"1.41421356", r"\sqrt{2}"),
    ("y=2x+1", "2x-y+1=0"),
    (r"99\pi", r"99\pi \text{ square inches}"),
    ("4i+3", "3+4i"),
    (r"\infty", r"+\infty"),
    # as models write it outside of LaTeX
    ("3√2", r"3\sqrt{2}"),
    ("√(x+1)", r"\sqrt{x+1}"),
    ("½", r"\frac12"),
    ("1½", "1.5"),
    ("x² + 1", "x^2+1"),
    ("10⁻⁷", "10^{-7}"),
    ("15 cm²", r"15 \text{ cm}^2"),
    ("(−∞, 3)", r"(-\infty,3)"),
    ("x ∈ [1, 2]", "[1,2]"),
    ("１２", "12"),
    ("2*pi", r"2\pi"),
    ("2π/3", r"\frac{2\pi}{3}"),
    ("3·4", "12"),
    ("2 ln 2", r"2\ln 2"),
    ("sin(x)", r"\sin x"),
    ("2**10", "1024"),
    # several values
    ("3, -3", r"\pm 3"),
    ("2, 1", "1,2"),
    (r"x=3 \text{ or } x=5", "3,5"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"1\le x\le 2", "[1,2]"),
    (r"\begin{pmatrix}2/2\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    # words
    (r"\text{Evelyn}", "evelyn"),
    ("(B)", r"\text{B}"),
    ("H, E", r"\text{E and H}"),
]

DIFFERENT = [
    # sign, digit, factor
    ("-12", "12"),
    ("12", "13"),
    ("12.1", "12"),
    ("1.2", "12"),
    ("1,080", "1.080"),
    ("1/2", "2/1"),
    ("0.333333", "1/3"),
    (r"3\frac{1}{2}", "1.5"),
    ("5.89e-7", "6.89e-7"),
    (r"\pi \times 10^{-20}", r"2\pi\times 10^{-20}"),
    (r"\frac{1}{2008!}", r"\frac{1}{2004!}"),
    ("1/0", "1/0.0"),
    ("5!", "5"),
    ("12 13", "13"),
    ("1 2", "12"),
    # words that are no units
    ("not 12", "12"),
    ("12 thousand", "12"),
    ("5 halves", "5"),
    ("12 and a half", "12"),
    ("12 or thirteen", "12"),
    ("6m", "6"),
    ("6", "6m"),
    # unit
    ("15 cm", "15 m"),
    ("15 cm^2", "15 cm^3"),
    ("12 cents", r"\$12"),
    (r"90^\circ", r"90\%"),
    ("2516_7", "2516_8"),
    ("0.11_2", "0.11_{20}"),
    ("8:34 a.m.", r"8:34 \text{ p.m.}"),
    # expressions
    ("x^2-1", "x^2+1"),
    ("k=3", "n=3"),
    ("4=5", "5"),
    ("x<5", "5"),
    (r"x \ne 5", "5"),
    (r"\infty", r"-\infty"),
    ("m", "M"),
    ("√12", "12"),
    ("√(x+1)", r"\sqrt{x}+1"),
    ("½", "12"),
    ("1½", r"\frac{11}{2}"),
    ("4²", "42"),
    ("x²", "x^3"),
    ("10⁻⁷", "10^7"),
    ("15 cm²", r"15 \text{ cm}^3"),
    ("x₁2", "12"),
    ("−∞", r"\infty"),
    ("2**3", "23"),
    ("2*3", "23"),
    ("3·4", "34"),
    ("2 ln 3", r"3\ln 2"),
    # order, brackets, number of values
    ("(1,2)", "(2,1)"),
    ("[1,2]", "(1,2)"),
    ("3, 4", "3"),
    ("3", "3, 4"),
    (r"12 \text{ or } 13", "12"),
    ("2, 3", "2, 2, 3"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    # words
    ("east", "seat"),
    ("east or west", "east"),
    ("A, B", "A, C"),
    ("yes", "no"),
    # nothing
    ("", ""),
    ("", "12"),
    ("12", ""),
    ("None", "None"),
    (".", "."),
    ("$$", "$$"),
]


@pytest.mark.parametrize(("prediction", "gold"), SAME)
def test_answers_that_are_the_same(prediction, gold):
    assert math_equal(prediction, gold)


@pytest.mark.parametrize(("prediction", "gold"), DIFFERENT)
def test_answers_that_differ(prediction, gold):
    assert not math_equal(prediction, gold)


@given(st.integers())
def test_an_integer_with_commas_equals_itself(n):
    assert math_equal(f"{n:,}", str(n))


@given(st.integers(), st.integers())
def test_two_integers_are_equal_only_if_they_are(a, b):
    assert math_equal(f"{a:,}", str(b)) == (a == b)


@given(st.decimals(-(10**9), 10**9, places=4), st.integers(1, 999))
def test_a_decimal_equals_its_fraction_and_no_neighbour(decimal, denominator):
    value = Fraction(decimal)
    text = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    assert math_equal(str(decimal), text)
    near = value + Fraction(1, denominator * 10**6)
    assert not math_equal(str(decimal), f"{near.numerator}/{near.denominator}")


@given(st.fractions(max_denominator=50).filter(lambda f: f > 0))
def test_a_mixed_number_equals_its_fraction(fraction):
    whole, rest = divmod(fraction, 1)
    mixed = rf"{whole}\frac{{{rest.numerator}}}{{{rest.denominator}}}"
    assert math_equal(mixed, f"{fraction.numerator}/{fraction.denominator}")


@settings(max_examples=30, deadline=None)
@given(st.text(st.sampled_from(r"\{}[]()<>$^_=+-/,.%0123456789xyab "), max_size=12))
def test_any_short_text_gets_a_verdict(text):
    assert boxed_math(rf"\boxed{{{text}}}", "12").status in ("correct", "wrong", "unparseable")


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        (r"\boxed{12}", "12"),
        (r"\boxed {12}", "12"),
        (r"\fbox{12}", "12"),
        (r"first \boxed{3}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{12} and \boxed{13 is cut off", "12"),
        (r"{ \boxed{12}", "12"),
        (r"\boxed{x = \boxed{\boxed{12}}}", "12"),
        (r"\boxed{}", ""),
        (r"\boxed{12", None),
        (r"\framebox{12}", None),
        ("12", None),
        ("", None),
    ],
)
def test_boxed_math_reads_the_last_complete_box(response, extracted):
    verdict = boxed_math(response, "999")
    assert verdict.extracted == extracted
    assert verdict.status == ("wrong" if extracted else "unparseable")


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        (" so 12 </think> <answer>12</answer>", "12"),
        ("so</think>\n\nTherefore\n<answer> 12 </answer>", "12"),
        ("</think> <answer>3</answer> no, <answer>12</answer>", "12"),
        ("</think> <answer><answer>12</answer>", "12"),
        (r"</think> <answer>\boxed{12}</answer>", "12"),
        (r"</think> <answer>So it is \boxed{12}.</answer>", "12"),
        ("</think> <answer></answer>", ""),
        ("</think> <answer>12", None),
        ("</think> 12</answer>", None),
        (r"</think> \boxed{12}", None),
        ("<answer>12</answer>", None),
        ("<answer>12</answer> </think>", None),
        ("", None),
    ],
)
def test_answer_tag_math_reads_the_last_tag_after_the_thinking(response, extracted):
    verdict = answer_tag_math(response, "999")
    assert verdict.extracted == extracted
    assert verdict.status == ("wrong" if extracted else "unparseable")


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        ("<answer>12</answer>", "12"),
        (r"\boxed{12}", "12"),
        (r"<answer>12</answer> \boxed{13}", "12"),
        (r"<answer>12 \boxed{13}", "13"),
        (r"<answer>12</answer>? No. </think> It is \boxed{13}.", "13"),
        (r"It is \boxed{13}. </think> The answer is 13.", "13"),
        ("12", None),
    ],
)
def test_math_answer_prefers_the_tag_to_the_box(response, extracted):
    assert math_answer(response, "999").extracted == extracted


def test_any_one_of_several_gold_answers_suffices():
    for golds in (("12", "13"), ["12", "13"]):
        assert boxed_math(r"\boxed{13}", golds).score == 1.0
        assert boxed_math(r"\boxed{14}", golds).score == 0.0
    assert boxed_math(r"\boxed{14}", ()).status == "wrong"


def test_a_wrong_answer_is_told_what_was_expected():
    assert boxed_math(r"\boxed{14}", ("12", "13")) == (0.0, "wrong", "14", "expected 12 or 13")


def test_megabytes_of_braces_take_linear_time():
    start = time.process_time()
    for text in (r"\boxed{" * 10**5, "{" * 10**6, r"\boxed" + " " * 10**6, "<answer>" * 10**5):
        assert math_answer(text, "12").status == "unparseable"
        assert not math_equal(text, "12")
    assert time.process_time() - start < 10


def test_every_template_has_a_verifier_of_its_format():
    verifiers = {name: verifier_for(t.answer_format) for name, t in TEMPLATES.items()}
    assert verifiers == {"r1": answer_tag_math, "qwen-math": boxed_math, "none": math_answer}


def test_an_unknown_answer_format_is_an_error_that_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"'spoken'.*boxed.*either.*tag"):
        verifier_for("spoken")


@given(
    st.lists(
        st.sampled_from(
            [
                *("</think>", "<answer>", "</answer>", r"\boxed{", "}", "12", "-7", "0", " ", "x"),
                "007",
            ]
        ),
        max_size=12,
    ).map("".join),
    st.sampled_from(["12", "-7", "7", "0", "x", "", ("3", "12"), ("x", "12")]),
    st.sampled_from([boxed_math, answer_tag_math, math_answer]),
)
def test_what_is_settled_at_once_is_what_the_verifier_says(response, answer, verifier):
    at_once = verdict_at_once(f"lmrl_env.verifiers:{verifier.__name__}", response, answer)
    assert at_once is None or at_once == verifier(response, answer)


def test_only_missing_answers_and_whole_numbers_are_settled_at_once():
    def at_once(response, answer="12"):
        return verdict_at_once("lmrl_env.verifiers:boxed_math", response, answer)

    assert at_once("no answer").status == "unparseable"
    assert at_once(r"\boxed{012}").status == "correct"
    assert at_once(r"\boxed{13}").status == "wrong"
    assert at_once(r"\boxed{\frac{24}{2}}") is None
    assert at_once(r"\boxed{12}", r"\frac{24}{2}") is None
    assert verdict_at_once("my_module:boxed_math", "no answer", "12") is None
