"""What a kernel module says of the specialisations that its host code can choose."""

from dataclasses import dataclass, field

TARGETS = (80, 90)  # compute capabilities for which every case is compiled without a GPU


@dataclass(frozen=True)
class Case:
    """One specialisation that the host code can choose.

    signature: kernel argument -> "*fp32", "i32", ... without the constexprs. constexprs: argument -> value.
    """

    name: str
    kernel: object
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    integers: dict[str, int] = field(default_factory=dict)  # examples, for which the launcher specialises a kernel
    targets: tuple[int, ...] = TARGETS  # where the host code chooses it
