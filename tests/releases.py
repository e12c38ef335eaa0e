"""What old releases of other packages lack, by the tests that need it: skipped there, with a word.

The package itself works with all of them (pyproject.toml): `make versions ARGS=oldest` tries it beside the oldest.
"""

from __future__ import annotations

import importlib.metadata
import re

# (package, first release that has it): beginnings of the names of tests, from the file's on
LACKING = {
    ("peft", (0, 17)): (  # LoRA of Conv1d, MultiheadAttention and single parameters
        "test_doctor.py::test_report",
        "test_doctor.py::test_names_that_the_terminal_cannot_show",
        "test_doctor.py::test_a_picture",
        "test_doctor.py::test_a_collapsed_adapter_is_told_of",
        "test_layers.py::test_a_layer_trains[experts",
        "test_layers.py::test_a_layer_trains[conv1d",
        "test_layers.py::test_a_layer_trains[attention",
        "test_peft.py::test_refactoring_the_pairs_keeps_the_update[experts",
        "test_peft.py::test_refactoring_the_pairs_keeps_the_update[conv1d",
        "test_peft.py::test_refactoring_the_pairs_keeps_the_update[attention",
        "test_peft.py::test_names_are_module_paths_and_adapters",
        "test_peft.py::test_grouped_convolutions_are_left_out_with_a_warning",
        "test_distributed.py::test_fsdp2_where_a_process_holds_nothing",
    ),
    ("transformers", (5, 3)): (  # a Trainer that calls an optimizer's factory; tp_plan="auto" for these models
        "test_trainer_optimizers.py::test_stop_and_resume_is_bit_equal",
        "test_trainer_optimizers.py::test_factory_is_the_optimizer_and_both_are_a_plain_loop",
        "test_trainer_optimizers.py::test_callback_reports_to_history_and_reporters",
        "test_trainer_optimizers.py::test_callback_counts_the_layers_skipped_since_the_last_log",
        "test_trainer_optimizers.py::test_adapter_loads_in_plain_peft_and_merges_and_the_base_is_untouched",
        "test_parallel.py::test_tensor_parallel",
    ),
    ("accelerate", (1, 6)): ("test_examples.py::test_fsdp2",),
    ("triton", (3, 6)): (
        "test_backends.py::test_unavailable_says_why",
        "test_backends.py::test_a_triton_that_is_too_old_is_named",
        "test_backends.py::test_without_a_compiler_triton_is_unavailable_and_says_so",
        "test_contract.py::test_triton_without_a_gpu",
    ),
    # Adam.step() where another device is the default; errors inside a graph without words of the graph's own
    ("torch", (2, 10)): (
        "test_ambient.py::test_wrapped[device context-Adam",
        "test_ambient.py::test_wrapped[default device-Adam",
        "test_compiled_functions.py::test_views_that_meet_in_a_graph_made_for_others[aot_eager",
    ),
}


def release(package: str) -> tuple[int, ...] | None:
    """(major, minor), None where it is not installed."""
    try:
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(package))[:2]))
    except importlib.metadata.PackageNotFoundError:
        return None


FOUND = {package: release(package) for package, _ in LACKING}


def lacking(test: str) -> str | None:
    """Why a test, named from its file on, cannot run beside what is installed, or None."""
    for (package, first), names in LACKING.items():
        found = FOUND[package]
        if found is not None and found < first and test.startswith(names):
            return f"needs {package} {'.'.join(map(str, first))}, found {'.'.join(map(str, found))}"
    return None
