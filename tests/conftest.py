"""Known defects: tests that state what should be, and are expected to fail until it is."""

import pytest

KNOWN_DEFECTS = {
    "test_an_autocast_stretch_becomes_nodes_that_enter_and_exit_it": "captured autocast caches no casts",
    "test_a_stretch_without_autocast_is_kept_where_the_caller_has_none": "captured autocast caches no casts",
    "test_nested_autocast_stretches_stay_nested": "captured autocast caches no casts",
    "test_autocast_inside_no_grad_stays_inside": "captured autocast caches no casts",
    "test_the_grad_mode_of_the_caller_does_not_change_what_is_captured": "capture under no_grad is not normalised",
    "test_output_and_gradients_are_bit_equal_to_eager_at_another_batch_size": "nested autocast stretches lose bits",
    "test_dynamo_traces_the_graph_again_with_free_sizes": "nested autocast stretches lose bits",
    "test_no_grad_inside_autocast_is_either_refused_or_right": "no_grad inside an autocast stretch is not seen",
    "test_a_forward_that_leaves_something_behind_is_refused": "lists changed in place are not noticed",
    "test_what_a_forward_leaves_behind_is_removed": "lists changed in place are not noticed",
    "test_private_attributes_count_as_any_other": "private attributes are not part of a graph's key",
    "test_a_level_that_is_some_bytes_short_is_not_enough": "the solver's tolerance is above one byte in a gibibyte",
    "test_a_bad_value_is_named_with_what_is_allowed": "devices of other kinds are refused with another text",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = KNOWN_DEFECTS.get(item.name.split("[")[0])
        if reason is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=False))
