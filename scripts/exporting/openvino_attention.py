"""Attention of one query in a graph for OpenVINO, which computes it wrongly on CPUs in versions 2026.4 and before."""

from typing import Any


def rewrite_attention_of_one_query(model: Any) -> None:
    """Replace unmasked attention of a single query, as in a decoder's step, by products and a softmax of its own.

    With a dynamic number of keys, OpenVINO 2026.4.1 computes such a ScaledDotProductAttention wrongly from 16 keys on
    (on CPUs with AVX-512; without an error), also if it is written as products around a softmax over the last
    dimension. A softmax over the dimension before, between two transpositions, is not fused and right.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ScaledDotProductAttention" and _is_of_one_query(node):
            output = _attention(*(node.input_value(i) for i in (0, 1, 2)), scale=node.input_value(4))
            for target in list(node.output(0).get_target_inputs()):
                target.replace_source_output(output)
    model.validate_nodes_and_infer_types()


def _is_of_one_query(node: Any) -> bool:
    """Whether an attention has one query, no mask (a scalar in the third place) and a given scale."""
    if len(node.inputs()) != 5:
        return False
    queries, mask = node.input(0).get_partial_shape(), node.input(3).get_partial_shape()
    return bool(len(queries) == 4 and queries[2] == 1 and len(mask) == 0)


def _attention(queries: Any, keys: Any, values: Any, *, scale: Any) -> Any:
    """Queries (B, h, 1, C/h), keys and values (B, h, T, C/h) -> the output (B, h, 1, C/h) of the attention."""
    import numpy as np
    from openvino import opset13 as ops

    exchange = np.array([0, 1, 3, 2])
    scores = ops.matmul(ops.multiply(queries, scale), keys, False, True)
    shares = ops.transpose(ops.softmax(ops.transpose(scores, exchange), 2), exchange)
    return ops.matmul(shares, values, False, False).output(0)
