"""A latency table of multiplications, for machines on which no time can be measured: others work there, too."""

from __future__ import annotations

from flextron.artefacts.latency_table import LatencyTable, Workload
from flextron.config import ElasticConfig


def arithmetic_table(config: ElasticConfig, length: int, choosing: bool = False) -> LatencyTable:
    """Millions of multiplications for a token of a prompt, in the decoder's layers, where a table has milliseconds.

    Embedding and head are left out, as for a prompt of which only the last token's logits are wanted. A query head
    multiplies with the mean number of keys that a causal mask leaves, (length + 1) / 2, twice.

    Args:
        config: shape and menus.
        length: tokens in a prompt.
        choosing: every token has widths of its own: keys and values of all groups are projected for each of them. The
            routers themselves, and the moving of rows, are not counted.
    """
    count, L = config.counts, config.num_layers
    query = count.query + config.head_dim * (length + 1)
    mlp = tuple(count.active * d / 1e6 for d in config.mlp_choices)
    heads = tuple(
        (config.query_heads(n) * query + (0 if choosing else config.kv_heads(n) * count.group)) / 1e6
        for n in config.head_choices
    )
    base = L * config.num_kv_heads * count.group / 1e6 if choosing else 0.0
    return LatencyTable(
        workload=Workload.prefill(length),
        machine={"device": "paper"},
        elastic=config,
        mlp=(mlp,) * L,
        heads=(heads,) * L,
        raw_mlp=(mlp,) * L,
        raw_heads=(heads,) * L,
        base=base,
        slope=1.0,
    )
