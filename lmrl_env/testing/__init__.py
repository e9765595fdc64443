"""Proofs for pytest: of estimators, of losses, of environments."""

from lmrl_env.testing.partition import assert_partition_invariant
from lmrl_env.testing.unbiased import assert_unbiased, bias_report
from lmrl_env.testing.vector_env import check_vector_env

__all__ = ["assert_partition_invariant", "assert_unbiased", "bias_report", "check_vector_env"]
