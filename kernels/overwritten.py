"""Whether a pipelined loop copies new operands over those that a product in flight still reads.

On sm_90 Triton issues a product of blocks in shared memory and goes on while it runs (`pendings` products may). Copies
of later blocks go into a ring of buffers meanwhile, which needs one more than it is ahead: Triton adds that one where
the product is the load's only use, and else leaves it out (triton-lang/triton#6691). What is then multiplied depends on
which comes first. Only the compiled program shows it: an interpreter does one thing at a time.
"""

import re

_ALLOCATION = re.compile(r"(%[\w#]+)(?::\d+)? = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
_VIEW = re.compile(r"(%\w+) = ttg\.memdesc_(?:index|trans|reinterpret|subslice) (%\w+)")
_COPY = re.compile(r"async_copy_global_to_local %\w+, (%\w+)")
_PRODUCT = re.compile(r"(%\w+) = ttng\.warp_group_dot (%\w+), (%\w+), .*isAsync = true")
_WAIT = re.compile(r"= ttng\.warp_group_dot_wait (.*)pendings = (\d+)")


def overwritten(ttgir: str) -> list[str]:
    """The rings of shared memory, by their names in Triton's intermediate program, that have no buffer to spare."""
    lines = ttgir.splitlines()
    buffers, views, copies, products, pending = {}, {}, {}, [], {}
    for i, line in enumerate(lines):
        if found := _ALLOCATION.search(line):
            buffers[found[1]] = int(found[2])
        elif found := _VIEW.search(line):
            views[found[1]] = views.get(found[2], found[2])
        elif found := _COPY.search(line):
            copies.setdefault(views.get(found[1], found[1]), []).append(i)
        elif found := _PRODUCT.search(line):
            products.append((i, *found.groups()))
        elif found := _WAIT.search(line):
            pending |= dict.fromkeys(re.findall(r"%\w+", found[1]), int(found[2]))
    short = set()
    for i, result, *operands in products:
        loop = max((j for j in range(i) if "scf.for" in lines[j]), default=None)
        if loop is None or not pending.get(result):
            continue
        for ring in (views.get(operand, operand) for operand in operands):
            if ring in buffers and ring in copies:
                ahead = sum(j < loop for j in copies[ring])
                before = any(loop < j < i for j in copies[ring])  # the next copy is issued before the product
                if buffers[ring] <= ahead + before:
                    short.add(ring)
    return sorted(short)
