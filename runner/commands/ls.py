"""`moe-edge ls`: the models in the cache that huggingface_hub and llama.cpp share."""

from __future__ import annotations

import time
from typing import Any

import click
from moe_edge.models.errors import printable
from moe_edge.runner.commands.parameters import SectionedCommand, print_result


@click.command("ls", cls=SectionedCommand)
@click.option("--json", "as_json", is_flag=True)
def command(as_json: bool) -> None:
    """List the models that were pulled, the one used last first."""
    from moe_edge.runner.hub.hub_cache import cache_folder, stored_models
    from moe_edge.runner.hub.names import quant_of

    found: list[dict[str, Any]] = [
        {"name": f"{each.repo}:{quant_of(each.files[0].name) or each.files[0].name}", "bytes": each.nbytes,
         "used": each.used, "path": str(each.files[0]), "commit": each.commit}
        for each in stored_models()
    ]  # fmt: skip
    if as_json:
        print_result(found)
        return
    lines = []
    for each in found:
        day = time.strftime("%Y-%m-%d", time.localtime(each["used"]))
        lines.append(f"{printable(str(each['name'])):60} {each['bytes'] / 1e9:8.2f} GB  {day}")
    print_result("\n".join(lines) or f"no model in {cache_folder()}; moe-edge pull USER/REPO brings one")
