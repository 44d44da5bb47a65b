"""Loading by several processes under torch.distributed: shards of DTensors, and replicated weights
that the processes of a group read once among them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from weightlift import dtypes
from weightlift.allocation import TorchAllocator, empty_on_host
from weightlift.errors import ArgumentError, CheckpointError
from weightlift.integrity import HashCheck
from weightlift.materialize import Loading, Ranges
from weightlift.plans import shown
from weightlift.report import LoadReport

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

    from weightlift.checkpoint import Checkpoint

__all__ = [
    "Team",
    "meeting",
    "sharding",
    "together",
]

# What a rank reads in one round: while a round is exchanged, the next is being read.
_ROUND_BYTES = 32 << 20
_LEAST_ROUND_BYTES = 1 << 20
# Smaller pieces travel together, copied into one buffer: a collective takes some 100 us on gloo.
_ALONE_BYTES = 256 << 10


@contextlib.contextmanager
def sharding(
    fill: Callable[..., LoadReport],
    device_mesh: DeviceMesh | None,
    tp_plan: Mapping[str, ParallelStyle] | None,
) -> Iterator[Callable[..., LoadReport]]:
    """For ``from_pretrained``: what it does within this, all ranks of the mesh do together.

    It gives the ``fill`` for a model on ``meta``: the model is cut for tensor parallelism, then
    each rank reads its own parts.

    Args:
        fill: ``modules.fill``.
        device_mesh: 1-D; all ranks, by default.
        tp_plan: module path, with ``*`` as in ``fnmatch`` -> how its parameters are cut; by
            default the model's ``_tp_plan``.

    Raises:
        ArgumentError: no plan, no process group, or a mesh that does not go.
    """
    _require_initialized("device_mesh and tp_plan")
    if device_mesh is None:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        device_mesh = init_device_mesh(kind, (dist.get_world_size(),))
    if device_mesh.ndim != 1:
        raise ArgumentError(
            f"device_mesh is {device_mesh}: tensor parallelism takes one dimension, such as "
            'device_mesh["tp"]'
        )
    if device_mesh.get_coordinate() is None:
        raise ArgumentError(f"device_mesh is {device_mesh}, and rank {dist.get_rank()} not of it")

    with _team([device_mesh.get_group()], None) as new_loading:

        def fill_parts(
            model: torch.nn.Module, checkpoint: Checkpoint, **options: Any
        ) -> LoadReport:
            plan = tp_plan if tp_plan is not None else getattr(model, "_tp_plan", None)
            if not plan:
                raise ArgumentError(
                    f"device_mesh needs tp_plan=, for {type(model).__name__} has no _tp_plan"
                )
            parallelize_module(model, device_mesh, dict(plan))
            return fill(model, checkpoint, **{**options, "new_loading": new_loading})

        yield fill_parts


def _require_initialized(what: str) -> None:
    if not dist.is_initialized():
        raise ArgumentError(
            f"{what} needs a process group: call torch.distributed.init_process_group() first, "
            "under torchrun"
        )


@contextlib.contextmanager
def together(
    model: torch.nn.Module, group: dist.ProcessGroup | DeviceMesh | None, scope: str = "node"
) -> Iterator[Callable[..., Loading]]:
    """Within it, a load that one rank cannot end ends on all with an error.

    It makes the ``Loading`` for ``fill``: that of a team, if there is a group or the model has
    DTensors.
    """
    if scope not in ("node", "group"):
        raise ArgumentError(f"scope is {scope!r}; it can be 'node' or 'group'")
    if group is not None:
        groups = [_parse_group(group)]
        _require_within(groups[0], model)
    else:
        groups = _groups_of(model)
    with _team(groups, scope if group is not None else None) as new_loading:
        yield new_loading


def _groups_of(model: torch.nn.Module) -> list[dist.ProcessGroup]:
    """Those of the meshes that the model's tensors are on."""
    meshes = {t.device_mesh: None for _, t in _all_tensors(model) if isinstance(t, DTensor)}
    found = [g for mesh in meshes if mesh.get_coordinate() for g in mesh.get_all_groups()]
    return list({group.group_name: group for group in found}.values())


def _require_within(group: dist.ProcessGroup, model: torch.nn.Module) -> None:
    ranks = set(dist.get_process_group_ranks(group))
    for name, tensor in _all_tensors(model):
        if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate():
            outside = set(tensor.device_mesh.mesh.flatten().tolist()) - ranks
            if outside:
                raise ArgumentError(
                    f"{name!r} is a DTensor on {tensor.device_mesh}, whose ranks "
                    f"{sorted(outside)} are not in group=, which has the ranks {sorted(ranks)}; "
                    "give a group of all of them"
                )


class Meeting:
    """A load that the ranks of a model's meshes do at the same time, each by itself."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self.ended = False

    def begin(
        self,
        checkpoint: Checkpoint | None,
        error: BaseException | None,
        wanted: Mapping[str, str],
    ) -> bool:
        """Waits for all ranks; ``False`` where none of them could open the checkpoint.

        Args:
            checkpoint: must be the same on all ranks.
            error: why there is none.
            wanted: the name of a tensor -> what becomes of it, the same on all ranks.
        """
        self.ended = True  # unless it is got through
        failure = None if error is None else f"{type(error).__name__}: {error}"
        known = None if checkpoint is None else _describe(checkpoint)
        payload = (failure, known, _digest(sorted(wanted.items())))
        said = self._team.agree(None, payload)
        if all(reason is not None for reason, _, _ in said.values()):
            self.ended = False
            return False
        self._team.refuse({rank: reason for rank, (reason, _, _) in said.items()}, error)
        _require_same(self._team, {rank: rest for rank, (_, *rest) in said.items()}, wanted)
        self.ended = False
        return True


@contextlib.contextmanager
def meeting(model: torch.nn.Module) -> Iterator[Meeting]:
    """Within it, what fails on one rank fails on all that share a model's DTensors.

    Raises:
        CheckpointError: on every rank, at the latest when it is left.
    """
    team = Team([group for group in _groups_of(model) if group.size() > 1], None)
    meeting = Meeting(team)
    try:
        yield meeting
    except Exception as error:
        if not meeting.ended:
            team.agree(error)
        raise
    team.agree(None)


@contextlib.contextmanager
def _team(
    groups: Sequence[dist.ProcessGroup], scope: str | None
) -> Iterator[Callable[..., Loading]]:
    if all(group.size() == 1 for group in groups):
        yield Loading
        return
    team = Team(groups, scope)
    try:
        yield functools.partial(_TeamLoading, team)
    except Exception as error:
        if not team.begun:  # the others wait for the beginning
            team.agree(error)
        raise
    finally:
        team.close()


def _all_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _parse_group(group: dist.ProcessGroup | DeviceMesh) -> dist.ProcessGroup:
    _require_initialized("group")
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(
            f"group is {group!r}, not a torch.distributed.ProcessGroup that this rank is in; "
            "torch.distributed.group.WORLD is all ranks"
        )
    return group


@dataclasses.dataclass(frozen=True)
class _Said:
    """What a rank tells the others at a point that all of them reach."""

    failure: str | None
    payload: Any


class Team:
    """The ranks that load together.

    Args:
        groups: over which a word goes to all of them, one after the other (those of a mesh).
        scope: who exchanges replicated tensors; ``None``: nobody.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup], scope: str | None) -> None:
        self.groups = groups
        self.scope = scope
        self.begun = False
        self._node: dist.ProcessGroup | None = None
        self._lost: CheckpointError | None = None

    def agree(self, error: BaseException | None, payload: Any = None) -> dict[int, Any]:
        """Waits for all ranks; returns what each of them gives.

        Raises:
            CheckpointError: on every rank, where one has an error.
        """
        said = self.gather(self.groups, error, payload)
        self.refuse({rank: one.failure for rank, one in said.items()}, error)
        return {rank: one.payload for rank, one in said.items()}

    @staticmethod
    def refuse(failures: Mapping[int, str | None], error: BaseException | None) -> None:
        """Raises, on all ranks alike, where one has failed."""
        reasons = [f"rank {rank}: {reason}" for rank, reason in failures.items() if reason]
        if reasons:
            raise CheckpointError(
                f"no rank has loaded anything, because of {'; '.join(reasons)}"
            ) from error

    def gather(
        self,
        groups: Sequence[dist.ProcessGroup],
        error: BaseException | None,
        payload: Any = None,
    ) -> dict[int, _Said]:
        """What all ranks of these groups say, by rank."""
        if self._lost is not None:
            raise self._lost
        failure = None if error is None else f"{type(error).__name__}: {error}"
        said = {dist.get_rank(): _Said(failure, payload)}
        for group in groups:
            heard: list[Any] = [None] * group.size()
            with self.naming_the_lost(group, failure):
                dist.all_gather_object(heard, said, group)
            for one in heard:
                said.update(one)
        return dict(sorted(said.items()))

    @contextlib.contextmanager
    def naming_the_lost(
        self, group: dist.ProcessGroup, failure: str | None = None
    ) -> Iterator[None]:
        """Within it, a rank that does not answer is a ``CheckpointError``."""
        try:
            yield
        except RuntimeError as error:  # torch's own errors of all backends are RuntimeErrors
            gone = _unreachable(group)
            who = f"rank {', '.join(map(str, gone))} is" if gone else "one of its ranks is"
            own = f"; rank {dist.get_rank()} itself had failed: {failure}" if failure else ""
            self._lost = CheckpointError(
                f"the load ended, because {who} gone or does not answer ({error}){own}"
            )
            raise self._lost from error

    def exchangers(self) -> dist.ProcessGroup:
        """Those who share the reading: all, or of this node."""
        (group,) = self.groups
        if self.scope == "node":
            nodes = self.agree(None, _node_id())
            mine = [rank for rank, node in nodes.items() if node == nodes[dist.get_rank()]]
            if len(mine) < len(nodes):
                made = dist.new_group(mine, use_local_synchronization=True)
                assert isinstance(made, dist.ProcessGroup)
                self._node = group = made
        return group

    def close(self) -> None:
        if self._node is not None and self._lost is None:
            dist.destroy_process_group(self._node)


def _node_id() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _unreachable(group: dist.ProcessGroup) -> list[int]:
    """The ranks whose connections are closed, where the backend tells that at once (gloo)."""
    if dist.get_backend(group) != "gloo":
        return []
    gone = []
    for peer in range(group.size()):
        if peer == group.rank():
            continue
        try:
            group.send([torch.zeros(1, dtype=torch.uint8)], peer, 0)
        except RuntimeError:
            gone.append(dist.get_global_rank(group, peer))
    return gone


@dataclasses.dataclass(slots=True)
class _Item:
    """A tensor that a team reads once; on ``meta`` until the load begins."""

    name: str
    device: torch.device
    tensor: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of an item, contiguous."""

    item: _Item
    dimension: int
    start: int
    count: int

    @property
    def tensor(self) -> torch.Tensor:
        tensor = self.item.tensor
        return tensor.narrow(self.dimension, self.start, self.count) if tensor.dim() else tensor

    @property
    def raw(self) -> torch.Tensor:
        return self.tensor.reshape(-1).view(torch.uint8)

    @property
    def ranges(self) -> Ranges:
        ranges = [(0, 1, extent) for extent in self.item.tensor.shape]
        if ranges:
            ranges[self.dimension] = (self.start, 1, self.count)
        return ranges


class _TeamLoading(Loading):
    """A load that all ranks of a team do at the same time."""

    def __init__(
        self, team: Team, checkpoint: Checkpoint, *, verify: bool = False, **options: Any
    ) -> None:
        super().__init__(checkpoint, **options)
        self._team = team
        self._verify = verify
        self._wanted: dict[str, str] = {}
        self._items: list[_Item] = []
        self._exchangers: dist.ProcessGroup | None = None
        self._exchanged: LoadReport | None = None
        self._failure: BaseException | None = None
        self._runs = False

    def add(
        self,
        device: torch.device,
        dtype: str | None = None,
        names: Sequence[str] | None = None,
        targets: Sequence[torch.Tensor] | None = None,
        parts: Sequence[Ranges] | None = None,
    ) -> None:
        chosen = list(self._checkpoint if names is None else names)
        own: list[int] = []
        for i, name in enumerate(chosen):
            kept, shape = self._checkpoint[name]
            if targets is not None:
                tensor = targets[i]
            else:
                kind = dtypes.to_torch(dtype if dtype and kept in dtypes.FLOATING else kept)
                tensor = torch.empty(shape, dtype=kind, device="meta")
            shared = parts is None and self._is_shared(name, kept, device, tensor)
            way = "read once for all" if shared else "read by each rank"
            self._wanted[name] = f"{tensor.dtype} on {device.type}, {way}"
            if shared:
                self._items.append(_Item(name, device, tensor))
            else:
                own.append(i)
        if own:
            super().add(
                device,
                dtype,
                [chosen[i] for i in own],
                None if targets is None else [targets[i] for i in own],
                None if parts is None else [parts[i] for i in own],
            )

    def _is_shared(self, name: str, kept: str, device: torch.device, tensor: torch.Tensor) -> bool:
        """Whether the team exchanges a tensor: where it is copied, and the engine can do it."""
        place = self._checkpoint.place(name)
        wanted = dtypes.file_name(tensor.dtype)
        if self._team.scope is None or place is None or place[2] is not None:
            return False
        castable = kept in dtypes.CASTABLE and wanted in dtypes.CASTABLE
        if (
            dtypes.bits(kept) % 8
            or not (kept == wanted or castable)
            or device.type not in ("cpu", "cuda")
            or not tensor.is_contiguous()
        ):
            return False
        # What would be mapped needs no exchange on one node: its ranks share the page cache.
        copied = device.type == "cuda" or not tensor.is_meta or kept != wanted or self._pin_memory
        rewritten = self._mode == "auto" and self._checkpoint.formats[place[0]] == "torch"
        return copied or rewritten or self._mode == "read" or self._team.scope == "group"

    @property
    def has_work(self) -> bool:
        return bool(self._groups or self._items)

    def start(self) -> None:
        team = self._team
        team.begun = True
        said = team.agree(
            None, (_describe(self._checkpoint), _digest(sorted(self._wanted.items())))
        )
        _require_same(team, said, self._wanted)
        if self._items:
            self._exchangers = team.exchangers()
        try:
            if self._verify:  # each file by one rank
                first, step = sorted(said).index(dist.get_rank()), len(said)
                self._hashes = HashCheck(self._checkpoint.parts[first::step])
            self._allocate()
            super().start()
            self._runs = True
        except Exception as error:  # result() tells the others
            self._failure = error

    def result(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        try:
            self._exchange()
            if self._failure is None:
                tensors = super().result()
                self._runs = False
        except Exception as error:
            self._failure = error
        finally:
            if self._runs:
                self.cancel()
        self._team.agree(self._failure)
        tensors.update((item.name, item.tensor) for item in self._items)
        return tensors

    @property
    def report(self) -> LoadReport:
        report = super().report
        return report if self._exchanged is None else report.plus(self._exchanged)

    def _allocate(self) -> None:
        sizes: dict[int, list[int]] = {}
        for item in self._items:
            if item.device.type == "cuda" and item.tensor.is_meta:
                sizes.setdefault(item.device.index, []).append(item.tensor.nbytes)
        if sizes and self._allocator is None:
            self._allocator = TorchAllocator()
        for index, of_device in sizes.items():
            assert self._allocator is not None
            self._allocator.reserve(index, of_device)
        for item in self._items:
            if item.tensor.is_meta and item.device.type == "cpu" and not self._pin_memory:
                item.tensor = empty_on_host(item.tensor.shape, item.tensor.dtype)
            elif item.tensor.is_meta:
                item.tensor = torch.empty_like(
                    item.tensor, device=item.device, pin_memory=self._pin_memory
                )

    def _exchange(self) -> None:
        """Round by round: what this rank has read goes to the others, and theirs comes; meanwhile
        the next round is being read."""
        group = self._exchangers
        if group is None:
            return
        rounds = _rounds(self._items, self._checkpoint, group.size())
        reads = [self._reading(shares[group.rank()]) for shares in rounds]
        sizes = [sum(p.raw.numel() for share in shares for p in share) for shares in rounds]
        running: Loading | None = None
        try:
            with shown(self._progress) as show:
                for k, shares in enumerate(rounds):
                    packed: list[torch.Tensor] = []
                    try:
                        if self._failure is not None:
                            raise self._failure
                        if k == 0:
                            running = _started(reads[0])
                        if running is not None:
                            running.result()
                        running = _started(reads[k + 1]) if k + 1 < len(reads) else None
                        packed = [_pack(share) for share in shares]
                    except Exception as error:
                        self._failure = error
                    said = self._team.gather([group], self._failure)
                    if any(one.failure is not None for one in said.values()):
                        return
                    with self._team.naming_the_lost(group):
                        _broadcast(group, shares, packed)
                    if show is not None:
                        show(sum(sizes[: k + 1]), sum(sizes))
        finally:
            if running is not None:
                running.cancel()
        headers = self._checkpoint
        theirs = [
            piece
            for shares in rounds
            for rank, share in enumerate(shares)
            if rank != group.rank()
            for piece in share
        ]
        report = LoadReport(
            bytes=sum(
                math.prod(count for _, _, count in piece.ranges)
                * dtypes.bits(headers[piece.item.name][0])
                // 8
                for piece in theirs
            )
        )
        for read in reads:
            if read.has_work:
                report = report.plus(read.report)
        self._exchanged = report

    def _reading(self, share: Sequence[_Piece]) -> Loading:
        loading = Loading(
            self._checkpoint,
            mode=self._mode,
            settings=self._settings,
            allocator=self._allocator,
            caller=self._caller,
        )
        by_device: dict[torch.device, list[_Piece]] = {}
        for piece in share:
            by_device.setdefault(piece.item.device, []).append(piece)
        for device, pieces in by_device.items():
            loading.add(
                device,
                None,
                [piece.item.name for piece in pieces],
                [piece.tensor for piece in pieces],
                [piece.ranges for piece in pieces],
            )
        return loading


def _started(loading: Loading) -> Loading | None:
    if not loading.has_work:
        return None
    loading.start()
    return loading


def _rounds(items: Sequence[_Item], checkpoint: Checkpoint, ranks: int) -> list[list[list[_Piece]]]:
    """Of each round, what each rank reads: stretches of the files, of equal lengths."""

    def place(item: _Item) -> tuple[int, int]:
        found = checkpoint.place(item.name)
        assert found is not None
        return found[:2]

    ordered = sorted((item for item in items if item.tensor.numel() > 0), key=place)
    total = sum(item.tensor.nbytes for item in ordered)
    # Several rounds even of a small model, so that reading and exchanging overlap.
    limit = min(max(total // (8 * ranks), _LEAST_ROUND_BYTES), _ROUND_BYTES)
    shares: list[list[_Piece]] = [[]]
    room = limit
    for item in ordered:
        shape = item.tensor.shape
        dimension = next((i for i, extent in enumerate(shape) if extent > 1), 0)
        rows = shape[dimension] if shape else 1
        row_bytes = item.tensor.nbytes // rows
        start = 0
        while start < rows:
            count = min(rows - start, room // row_bytes)
            if count == 0 and room == limit:
                count = 1
            if count:
                shares[-1].append(_Piece(item, dimension, start, count))
            start += count
            room -= count * row_bytes
            if start < rows or room <= 0:
                shares.append([])
                room = limit
    while len(shares) % ranks:
        shares.append([])
    return [shares[i : i + ranks] for i in range(0, len(shares), ranks)]


def _small(share: Sequence[_Piece]) -> list[torch.Tensor]:
    return [raw for raw in (piece.raw for piece in share) if raw.numel() < _ALONE_BYTES]


def _pack(share: Sequence[_Piece]) -> torch.Tensor:
    """The small pieces of a share, one behind the other."""
    small = _small(share)
    device = small[0].device if small else torch.device("cpu")
    return torch.cat([raw.to(device) for raw in small]) if small else torch.empty(0)


def _broadcast(
    group: dist.ProcessGroup, shares: Sequence[Sequence[_Piece]], packed: Sequence[torch.Tensor]
) -> None:
    """Every rank's share to all; in place, but for the small pieces."""
    works: list[Any] = []
    for rank, (share, buffer) in enumerate(zip(shares, packed, strict=True)):
        large = [raw for raw in (p.raw for p in share) if raw.numel() >= _ALONE_BYTES]
        works += [
            dist.broadcast(tensor, group=group, group_src=rank, async_op=True)
            for tensor in [*large, *([buffer] if buffer.numel() else [])]
        ]
    for work in works:
        work.wait()
    for rank, (share, buffer) in enumerate(zip(shares, packed, strict=True)):
        if rank == group.rank():
            continue
        begin = 0
        for raw in _small(share):
            raw.copy_(buffer[begin : begin + raw.numel()])
            begin += raw.numel()


def _describe(checkpoint: Checkpoint) -> tuple[str, str]:
    """(hash of the index and of the files' sizes, for a person)."""
    sizes = [part.size for part in checkpoint.parts]
    what = f"{len(checkpoint)} tensors in {len(sizes)} files of {sum(sizes)} bytes"
    where = checkpoint.paths[0] if sizes else "memory"
    return _digest((checkpoint.headers(), sizes)), f"{what} ({where})"


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


def _require_same(team: Team, said: Mapping[int, Sequence[Any]], wanted: Mapping[str, str]) -> None:
    """Raises, on all ranks alike, where the ranks are to load different things."""
    first = min(said)
    for rank, ((digest, text), _) in said.items():
        if digest != said[first][0][0]:
            raise CheckpointError(
                f"the ranks have different checkpoints: rank {first} has {said[first][0][1]}, "
                f"rank {rank} has {text}; names, shapes and sizes of the files must be the same"
            )
    if all(digest == said[first][1] for _, digest in said.values()):
        return
    everyone = team.agree(None, dict(wanted))
    for rank, names in everyone.items():
        for name in sorted(names.keys() | everyone[first].keys()):
            here, there = names.get(name), everyone[first].get(name)
            # Without an exchange, a rank may have modules that the others have not.
            if here != there and (team.scope is not None or None not in (here, there)):
                raise CheckpointError(
                    f"the ranks load different things: {name!r} is to be {there or 'nowhere'} on "
                    f"rank {first} and {here or 'nowhere'} on rank {rank}"
                )
