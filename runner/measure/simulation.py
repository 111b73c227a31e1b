"""`moe-edge simulate`: policies, cache rules and budgets tried on a trace, beside Belady's bound; table, JSON, picture.

No model, no disk: schedulers/replay/simulate.py says what is exact (the counts) and what is estimated (the times).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from typing import Any

from moe_edge.models.calibration import Calibration
from moe_edge.models.errors import BudgetTooSmall, UnknownName, UsageError, printable
from moe_edge.schedulers.budget import arena_floor_bytes, format_arg, format_bytes, plan_memory
from moe_edge.schedulers.eviction import RULES, named_rule
from moe_edge.schedulers.lookahead.rules import LOOKAHEADS
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies import DEFAULTS, POLICY_NAMES
from moe_edge.schedulers.policy import make_policy
from moe_edge.schedulers.replay.atomic import largest_step_bytes
from moe_edge.schedulers.replay.belady import has_one_size, simulate_belady
from moe_edge.schedulers.replay.prediction import Quality, missed_uses, prediction_quality
from moe_edge.schedulers.replay.simulate import MEMORY_BYTES_PER_SECOND, Costs, SimResult, simulate_policy
from moe_edge.schedulers.replay.trace import Trace
from moe_edge.schedulers.settings import policy_selects
from moe_edge.schedulers.split import SplitCosts, choose_packed_bytes, plan_split, rank_chances

BELADY = "belady"
SLACK = 0.15  # what the default cache rule may read above the best one without a note


@dataclass(frozen=True)
class SimBudget:
    """Bytes of the expert arena, and the --ram they were worked out from, if any."""

    arena_bytes: int
    ram_bytes: int | None = None


@dataclass(frozen=True)
class SimRow:
    """One policy with one cache rule and one look-ahead, at one budget.

    policy: the name, then the options that are not the default ones. cache: the eviction rule, `auto` by the name it
    stands for, None for belady; is_default: whether auto stands for it. best: with this policy and look-ahead at this
    budget some cache rule reads more bytes and none reads fewer.
    packed_bytes: of the arena, what keeps packed experts. packed_share: of the expert uses, those whose packed expert
    was in memory, whole or in part, so that it had to be unpacked.
    arena_share: of all experts at the high level. bytes_per_token: read from disk. low_share, skipped_share: of the
    expert uses, skipped ones included. reads_to_belady: bytes read over those of the row `belady` at this budget.
    prefetched and the four after it: units, as in SimResult.
    """

    policy: str
    cache: str | None
    lookahead: str
    is_default: bool
    ram_bytes: int | None
    arena_bytes: int
    arena_share: float
    hit_rate: float
    low_share: float
    skipped_share: float
    loads: int
    evictions: int
    bytes_per_token: float
    stall_ms_per_token: float
    tok_s: float
    reads_to_belady: float | None
    prefetched: int = 0
    prefetch_useful: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    prefetch_cancelled: int = 0
    packed_bytes: int = 0
    packed_share: float = 0.0
    best: bool = False


@dataclass(frozen=True)
class Prediction:
    """How good the trace's look-ahead is. Each row's miss_recall has one value for each of arena_bytes: over the misses
    of the exact policy with this cache rule, without look-ahead."""

    cache: str
    arena_bytes: tuple[int, ...]
    rows: tuple[Quality, ...]

    def lines(self) -> list[str]:
        head = ["layers ahead", "width", "recall", "precision"]
        head += [f"of misses, {format_bytes(n)}" for n in self.arena_bytes]
        table = [
            (str(row.distance), str(row.width), f"{row.recall:.1%}", f"{row.precision:.1%}",
             *("-" if share is None else f"{share:.1%}" for share in row.miss_recall))
            for row in self.rows
        ]  # fmt: skip
        return [
            "look-ahead: recall, how many of the experts used were predicted; precision, how many predicted were used;",
            f"of misses: recall over what the exact policy and {self.cache} miss with so many bytes of experts",
            "",
            *_table([tuple(head), *table]),
        ]


@dataclass(frozen=True)
class Simulation:
    """All rows, budget by budget, and what was left out, one sentence each. tokens: of the trace.

    belady_exact: experts have one size; else the rows `belady` are a heuristic (schedulers/replay/belady.py).
    atomic: every step was taken for one event, prompts' too.
    notes: where the default cache rule reads SLACK more than the best. prediction: None without a row that looks ahead.
    """

    model: str
    tokens: int
    decode_only: bool
    costs: Costs
    belady_exact: bool
    rows: tuple[SimRow, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()
    prediction: Prediction | None = None
    atomic: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """A table for people."""
        kind = "one token at a time" if self.decode_only else "with micro-batches of several tokens"
        lines = [
            f"{printable(self.model)}: {self.tokens} tokens, {kind}; "
            f"disk {self.costs.disk_bytes_per_second / 1e6:.0f} MB/s; "
            "counts are exact, times estimated",
            *(["every step is one event: none of its experts makes room for another of it"] if self.atomic else []),
            "",
        ]
        head, *table = _table([_HEAD, *(_cells(row, self.tokens) for row in self.rows)])
        lines.append(head)
        for _, of_budget in groupby(zip(self.rows, table, strict=True), lambda pair: _budget_of(pair[0])):
            lines += [*(line for _, line in of_budget), ""]
        lines += self.notes
        if not self.belady_exact:
            lines.append("experts differ in size: the belady rows are a heuristic, not a bound")
        lines += [f"left out: {sentence}" for sentence in self.left_out]
        if self.prediction:
            lines += [*([""] if lines[-1] else []), *self.prediction.lines()]
        return "\n".join(lines).rstrip()


_HEAD = (
    "policy", "cache", "look-ahead", "--ram", "experts", "share", "packed", "hits",
    "unpacked", "low", "skipped", "ahead/token", "useful",
    "MB/token", "stall ms", "tok/s", "reads/belady", "",
)  # fmt: skip


def _cells(row: SimRow, tokens: int) -> tuple[str, ...]:
    return (
        row.policy,
        "-" if row.cache is None else f"{row.cache} (auto)" if row.is_default else row.cache,
        "-" if row.lookahead == "off" else row.lookahead,
        "-" if row.ram_bytes is None else format_bytes(row.ram_bytes),
        format_bytes(row.arena_bytes),
        f"{row.arena_share:.1%}",
        format_bytes(row.packed_bytes) if row.packed_bytes else "-",
        f"{row.hit_rate:.1%}",
        f"{row.packed_share:.1%}" if row.packed_share else "-",
        f"{row.low_share:.1%}" if row.low_share else "-",
        f"{row.skipped_share:.1%}" if row.skipped_share else "-",
        f"{row.prefetched / tokens:.2f}" if row.prefetched else "-",
        f"{row.prefetch_useful / row.prefetched:.1%}" if row.prefetched else "-",
        f"{row.bytes_per_token / 1e6:.2f}",
        f"{row.stall_ms_per_token:.2f}",
        f"{row.tok_s:.2f}",
        "-" if row.reads_to_belady is None else f"{row.reads_to_belady:.3f}",
        "best" if row.best else "",
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of equal columns, words to the left and numbers to the right; a column that says nothing is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(cell not in ("-", "") for cell in column[1:])]
    widths = [max(map(len, column)) for column in columns]
    left = [not any(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    return [
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(cells, widths, left, strict=True)
        ).rstrip()
        for cells in zip(*columns, strict=True)
    ]


def _budget_of(row: SimRow) -> tuple[int, int | None]:
    return row.arena_bytes, row.ram_bytes


def run_simulations(
    trace: Trace,
    budgets: Sequence[SimBudget],
    policies: Sequence[PolicyOptions],
    costs: Costs | None = None,
    *,
    calibration: Calibration | None = None,
    belady: bool = True,
    packed: Sequence[str] = ("off",),
    atomic: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Simulation:
    """Every policy at every budget, from an empty arena, with Belady's bound first at each.

    A policy that this model or its calibration cannot serve is left out, and `left_out` says why; so is one at a budget
    that is below what it needs. One that is there twice, once as `auto`, is run once. With a policy that looks ahead
    comes the quality of the trace's predictions. packed: packed caches to try, as --packed-cache names them; auto is
    the planner's, with these costs. atomic: every step is one event, whose experts are not evicted for each other; as
    the engine has it only for steps of one token. tell: called with a line of progress before each run.
    Raises BudgetTooSmall for an arena below the floor, UsageError when nothing is left to run and for look-ahead on a
    trace without scores.
    """
    costs = costs or Costs()
    floor = floor_bytes(trace, atomic)
    for budget in budgets:
        if budget.arena_bytes < floor:
            all_of = ", all experts of its largest step" if atomic else ", one expert for each MoE layer"
            raise BudgetTooSmall(
                f"an expert arena of {format_arg(budget.arena_bytes)} is too small: {trace.model} needs "
                f"{format_arg(floor)}{all_of}", floor,
            )  # fmt: skip
    usable, left_out = _usable(trace, policies, calibration)
    if not budgets or not (usable or belady):
        raise UsageError("nothing to simulate: " + ("; ".join(left_out) or "no budget or no policy was given"))
    looks_ahead = any(options.lookahead != "off" for options in usable)
    if looks_ahead and trace.ahead_experts is None:
        raise UsageError(f"the trace of {trace.model} has no look-ahead scores; record it again, one token at a time: "
                         "moe-edge trace MODEL --text FILE -o t.npz --lookahead-depth 3")  # fmt: skip
    default, rows = named_rule("auto", trace.layout()), list[SimRow]()
    for budget in budgets:
        best = None
        if belady:
            tell(f"{BELADY}, experts {format_bytes(budget.arena_bytes)}")
            best = simulate_belady(trace, budget.arena_bytes, costs, atomic=atomic)
            rows.append(_row(trace, PolicyOptions(BELADY), budget, best, best))
        of_budget: list[SimRow] = []
        for options in usable:
            tell(f"{_full_label(options)}, experts {format_bytes(budget.arena_bytes)}")
            for asked in packed:
                try:
                    nbytes = packed_bytes_of(trace, asked, budget.arena_bytes, costs)
                    if nbytes == 0 and asked != "off" and "off" in packed:
                        continue  # the same as without
                    result = simulate_policy(
                        trace, options, budget.arena_bytes, costs, calibration, packed_bytes=nbytes, atomic=atomic
                    )
                except (BudgetTooSmall, UsageError) as e:
                    left_out.append(f"{policy_label(options)} at experts {format_bytes(budget.arena_bytes)}: {e}")
                    continue
                row = replace(_row(trace, options, budget, result, best), packed_bytes=nbytes)
                of_budget.append(replace(row, is_default=row.cache == default))
        rows += _mark_best(of_budget)
    prediction = None
    if looks_ahead:
        tell("how good the predictions are")
        prediction = _predict(trace, usable[0].cache, budgets)
    return Simulation(
        model=trace.model,
        tokens=trace.n_tokens,
        decode_only=trace.decode_only,
        costs=costs,
        belady_exact=has_one_size(trace),
        rows=tuple(rows),
        left_out=tuple(dict.fromkeys(left_out)),
        notes=(*_cannot_choose(usable, calibration), *_far_from_best(rows)),
        prediction=prediction,
        atomic=atomic,
    )


def floor_bytes(trace: Trace, atomic: bool = False) -> int:
    """The smallest expert arena that can be simulated: one expert for each layer, and with `atomic` a whole step."""
    floor = arena_floor_bytes(trace.layout())
    return max(floor, largest_step_bytes(trace)) if atomic else floor


def _cannot_choose(policies: Sequence[PolicyOptions], calibration: Calibration | None) -> list[str]:
    """What a simulation leaves out of policies that choose other experts than the router."""
    names = dict.fromkeys(options.name for options in policies if policy_selects(options, calibration))
    return [
        f"{name}: a trace has the experts that were chosen, not the scores of the others, so nothing is replaced here "
        f"and its rows read more than it does; measure it with moe-edge eval MODEL --policy {name}"
        for name in names
    ]


def packed_bytes_of(trace: Trace, asked: str, arena_bytes: int, costs: Costs) -> int:
    """Bytes of the packed cache that --packed-cache names, in this arena. Raises UsageError."""
    if asked == "off":
        return 0
    sizes, layout = trace.packed_sizes(), trace.layout()
    if sizes is None:
        raise UsageError(f"a packed cache needs packed experts, and those of {trace.model} are raw in its trace; "
                         "convert the model with --pack planes and record it again")  # fmt: skip
    nbytes = choose_packed_bytes(asked, layout, sizes, arena_bytes)
    if nbytes is not None:
        return nbytes
    unit = float(trace.unit_bytes.mean())
    use = unit / MEMORY_BYTES_PER_SECOND if costs.use_seconds is None else costs.use_seconds
    other = costs.other_seconds or 0.0
    if costs.use_seconds is None and trace.compute_seconds is not None and trace.other_seconds is not None:
        one = trace.step_tokens == 1
        use = float(trace.compute_seconds[one].mean()) / trace.n_used
        other = float(trace.other_seconds[one].mean())
    read = float(trace.read_bytes.mean()) / costs.disk_bytes_per_second
    of_expert = SplitCosts(use, unit / costs.unpack_bytes_per_second, read, other)
    return plan_split(layout, sizes, arena_bytes, trace.n_used, rank_chances(trace), of_expert).packed_bytes


def _usable(
    trace: Trace, policies: Sequence[PolicyOptions], calibration: Calibration | None
) -> tuple[list[PolicyOptions], list[str]]:
    """What can be run, cache rules by their own names; and why the others cannot."""
    layout = trace.layout()
    usable, left_out = [], []
    for options in policies:
        try:
            make_policy(options, layout, layout.total_bytes, calibration)
        except UnknownName:
            raise
        except UsageError as e:
            left_out.append(f"{policy_label(options)}: {e}")
        else:
            usable.append(replace(options, cache=named_rule(options.cache, layout)))
    return list(dict.fromkeys(usable)), list(dict.fromkeys(left_out))


def _row(trace: Trace, options: PolicyOptions, budget: SimBudget, result: SimResult, best: SimResult | None) -> SimRow:
    asked = result.uses + result.skipped_uses or 1
    is_belady = options.name == BELADY
    return SimRow(
        policy=BELADY if is_belady else policy_label(options),
        cache=None if is_belady else options.cache,
        lookahead=options.lookahead,
        is_default=False,
        ram_bytes=budget.ram_bytes,
        arena_bytes=budget.arena_bytes,
        arena_share=budget.arena_bytes / trace.layout().total_bytes,
        hit_rate=result.hit_rate,
        low_share=result.low_uses / asked,
        skipped_share=result.skipped_uses / asked,
        loads=result.loads,
        evictions=result.evictions,
        bytes_per_token=result.bytes_per_token,
        stall_ms_per_token=1e3 * result.stall_seconds / result.tokens,
        tok_s=result.tok_s,
        reads_to_belady=result.bytes_read / best.bytes_read if best and best.bytes_read else None,
        prefetched=result.prefetched,
        prefetch_useful=result.prefetch_useful,
        prefetch_late=result.prefetch_late,
        prefetch_wasted=result.prefetch_wasted,
        prefetch_cancelled=result.prefetch_cancelled,
        packed_share=(result.packed_hits + result.exponent_hits + result.mantissa_hits) / asked,
    )


def _rivals(rows: Sequence[SimRow]) -> list[list[SimRow]]:
    """Rows that differ in their cache rule alone, belady's left out."""
    groups: dict[tuple[object, ...], list[SimRow]] = {}
    for row in rows:
        if row.cache is not None:
            groups.setdefault((_budget_of(row), row.policy, row.lookahead, row.packed_bytes), []).append(row)
    return list(groups.values())


def _mark_best(rows: Sequence[SimRow]) -> list[SimRow]:
    """The rows of one budget, of each group the one that reads least marked: the first of equals, none if all are."""

    def read(row: SimRow) -> float:
        return row.bytes_per_token

    best = {id(min(group, key=read)) for group in _rivals(rows) if min(map(read, group)) < max(map(read, group))}
    return [replace(row, best=id(row) in best) for row in rows]


def _far_from_best(rows: Sequence[SimRow]) -> list[str]:
    """A sentence for each group whose default rule reads SLACK more than its best one."""
    notes = []
    for group in _rivals(rows):
        default = next((row for row in group if row.is_default), None)
        best = next((row for row in group if row.best), None)
        if default and best and default.bytes_per_token > (1 + SLACK) * best.bytes_per_token:
            more = default.bytes_per_token / best.bytes_per_token - 1 if best.bytes_per_token else float("inf")
            ahead = "" if default.lookahead == "off" else f" with look-ahead {default.lookahead}"
            notes.append(
                f"{default.policy}{ahead}, experts {format_bytes(default.arena_bytes)}: "
                f"the default cache rule, {default.cache}, reads {more:.0%} more than {best.cache}"
            )
    return notes


def _predict(trace: Trace, cache: str, budgets: Sequence[SimBudget]) -> Prediction:
    misses = [missed_uses(trace, cache, budget.arena_bytes) for budget in budgets]
    return Prediction(cache, tuple(b.arena_bytes for b in budgets), tuple(prediction_quality(trace, misses)))


def policy_label(options: PolicyOptions) -> str:
    """`dymoe`, or `dymoe retention=0.75` where options differ from the default ones; cache and look-ahead apart."""
    turned = dict(options.turned())
    changed = [f"{name}={turned[name]}" for name in DEFAULTS if turned.get(name, DEFAULTS[name]) != DEFAULTS[name]]
    bound = [] if options.max_kld is None else [f"max_kld={options.max_kld}"]
    return " ".join([options.name, *changed, *bound])


def _full_label(options: PolicyOptions) -> str:
    return ", ".join([policy_label(options), options.cache, *([options.lookahead] * (options.lookahead != "off"))])


def policies_named(
    policies: str, options: PolicyOptions | None = None, *, caches: str | None = None, lookaheads: str = "off"
) -> list[PolicyOptions]:
    """'exact,dymoe' -> their options, each with each of the cache rules and look-aheads, which are named alike.

    'all': every known one; policies then have their default options. caches None: auto, but with policies 'all' every
    rule for exact. options: knobs for the named policies; its own name, cache and look-ahead are not looked at.
    Raises UnknownName.
    """
    names = _named(policies, POLICY_NAMES, "policy")
    knobs = PolicyOptions() if policies.strip() == "all" else options or PolicyOptions()
    by_default = {name: RULES if policies.strip() == "all" and name == "exact" else ("auto",) for name in names}
    return [
        replace(knobs, name=name, cache=cache, lookahead=lookahead)
        for name in names
        for cache, lookahead in product(
            by_default[name] if caches is None else _named(caches, RULES, "cache rule"),
            _named(lookaheads, LOOKAHEADS, "look-ahead"),
        )
    ]


def _named(names: str, known: Sequence[str], what: str) -> list[str]:
    if names.strip() == "all":
        return list(known)
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise UnknownName(f"unknown {what} '{name}'; known: all, {', '.join(known)}")
    return chosen


def budget_of_ram(trace: Trace, ram_bytes: int) -> SimBudget:
    """What --ram leaves for the experts, as the engine that recorded the trace would split it.

    Raises BudgetTooSmall with the number that would work, UsageError for a trace without the model's fixed sizes.
    """
    if trace.fixed is None:
        raise UsageError(f"the trace of {trace.model} does not say what the model needs besides its experts; "
                         "give the bytes of the expert arena instead")  # fmt: skip
    plan = plan_memory(ram_bytes, trace.fixed, trace.layout(), trace.n_used)
    return SimBudget(plan.arena_bytes, ram_bytes)


def even_budgets(trace: Trace, n: int = 5, *, atomic: bool = False) -> list[SimBudget]:
    """n arenas from floor_bytes() to all experts in memory, in equal steps of whole bytes."""
    floor = floor_bytes(trace, atomic)
    top = max(floor, trace.layout().total_bytes)
    return [SimBudget(floor + (top - floor) * i // max(1, n - 1)) for i in range(n)]
