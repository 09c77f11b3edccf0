"""Runs the PTX of a kernel for one warp: what the inline assembly of the device wrappers says.

Enough of the PTX ISA for benchmarks/gpu_golden.cuh as nvcc compiles it. Lanes are in step, so a
branch must be taken by all or by none. Registers are bit patterns, a column of 32 each. Matrix
instructions follow the ISA's fragment layouts (9.7.15), with sums in float64: operands must be such
that every order of addition is exact.
"""

import re

import numpy as np

LANES = 32
INPUT, OUTPUT, SHARED = 1 << 32, 2 << 32, 1 << 20  # where memory begins
BITS = {"b8": 8, "u8": 8, "b16": 16, "u16": 16, "s16": 16, "b32": 32, "u32": 32, "s32": 32,
        "f32": 32, "b64": 64, "u64": 64, "s64": 64}  # fmt: skip


def _signed(values, bits):
    shifted = values.astype(np.uint64) << np.uint64(64 - bits)
    return shifted.view(np.int64) >> np.int64(64 - bits)


def _cut(values, bits):
    values = np.asarray(values).astype(np.int64).view(np.uint64)
    return values if bits == 64 else values & np.uint64((1 << bits) - 1)


def _float(words):
    return words.astype(np.uint32).view(np.float32)


def _float_bits(values):
    return values.astype(np.float32).view(np.uint32).astype(np.uint64)


def _half_bits(values):
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16).astype(np.uint64)


def _half(words):
    return words.astype(np.uint16).view(np.float16).astype(np.float32)


def _bfloat16_bits(values):
    """Nearest bfloat16, ties to even; any NaN is one."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), np.uint64(0x7FFF), rounded)


def _bfloat16(words):
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _halves(word, convert):
    return [convert(word & np.uint64(0xFFFF)), convert(word >> np.uint64(16))]


class Warp:
    """One warp and its memory. `run` executes the kernel and gives the bytes that it wrote."""

    def __init__(self, text, parameters, inputs, n_output_bytes):
        """parameters: one integer each, addresses as INPUT and OUTPUT."""
        body = text[text.index(".entry") :]
        self.lines = [line.strip() for line in body[body.index("{") + 1 :].split("\n")]
        self.parameters = parameters
        shared = re.findall(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\]", body)
        self.symbols = {name: SHARED for name, _ in shared}
        assert len(shared) <= 1, "one shared array is known"
        self.memory = {
            INPUT: bytearray(inputs),
            OUTPUT: bytearray(b"\xff" * n_output_bytes),
            SHARED: bytearray(b"\xff" * sum(int(size) for _, size in shared)),
        }
        self.registers = {}
        self.copies = []  # of cp.async that have not landed: (lane's address, bytes)

    # ---- operands

    def get(self, operand, bits=32):
        if operand == "%tid.x":
            return np.arange(LANES, dtype=np.uint64)
        if operand.startswith("%"):
            return self.registers[operand]
        if operand in self.symbols:
            return np.full(LANES, self.symbols[operand], np.uint64)
        return _cut(np.full(LANES, int(operand, 0), np.int64), bits)

    def address(self, operand):
        base, _, offset = operand.strip("[]").partition("+")
        return self.get(base, 64) + np.uint64(int(offset or 0))

    def bytes_at(self, address, n):
        for base, memory in self.memory.items():
            if base <= address <= base + len(memory) - n:
                return memory, int(address) - base
        raise AssertionError(f"{n} bytes at {address:#x} are in no memory")

    def load(self, address, n_bytes):
        words = []
        for lane in range(LANES):
            memory, at = self.bytes_at(address[lane], n_bytes)
            words.append(int.from_bytes(memory[at : at + n_bytes], "little"))
        return np.array(words, np.uint64)

    def store(self, address, words, n_bytes):
        for lane in range(LANES):
            memory, at = self.bytes_at(address[lane], n_bytes)
            memory[at : at + n_bytes] = int(words[lane]).to_bytes(n_bytes, "little")

    # ---- control

    def run(self):
        labels = {line[:-1]: i for i, line in enumerate(self.lines) if line.endswith(":")}
        at = 0
        while True:
            line, at = self.lines[at], at + 1
            if not line or line.startswith(("//", ".")) or line.endswith(":"):
                continue
            taken = True
            if guard := re.match(r"@(!?)(%p\d+)\s+", line):
                truth = self.registers[guard[2]] != bool(guard[1])
                assert truth.all() or not truth.any(), f"the warp diverges at {line}"
                line, taken = line[guard.end() :], bool(truth.all())
            name, _, rest = line.rstrip(";").partition(" ")
            name, rest = name.strip(), rest.strip()
            if "\t" in name:
                name, _, more = name.partition("\t")
                rest = f"{more} {rest}".strip()
            if not taken:
                continue
            if name == "ret":
                return bytes(self.memory[OUTPUT])
            if name in ("bra", "bra.uni"):
                at = labels[rest]
                continue
            self.execute(name, [part.strip() for part in _split(rest)])

    def execute(self, name, operands):
        kind = name.split(".")
        method = getattr(self, f"do_{kind[0]}", None)
        if method is None:
            raise NotImplementedError(f"the PTX instruction {name} is not known here")
        method(kind, operands)

    # ---- moves and integers

    def do_ld(self, kind, operands):
        size = BITS[kind[-1]] // 8
        if kind[1] == "param":
            index = int(re.search(r"_param_(\d+)", operands[1])[1])
            self.registers[operands[0]] = np.full(LANES, self.parameters[index], np.uint64)
            return
        address = self.address(operands[1])
        for i, register in enumerate(_names(operands[0])):
            self.registers[register] = self.load(address + np.uint64(i * size), size)

    def do_st(self, kind, operands):
        size, address = BITS[kind[-1]] // 8, self.address(operands[0])
        for i, register in enumerate(_names(operands[1])):
            self.store(address + np.uint64(i * size), self.get(register), size)

    def do_mov(self, kind, operands):
        self.registers[operands[0]] = self.get(operands[1], BITS[kind[-1]])

    def do_cvta(self, kind, operands):
        self.registers[operands[0]] = self.get(operands[1], 64)

    def do_bar(self, kind, operands):
        assert kind == ["bar", "warp", "sync"]

    def do_selp(self, kind, operands):
        to, yes, no, predicate = operands
        self.registers[to] = np.where(self.registers[predicate], self.get(yes), self.get(no))

    def do_setp(self, kind, operands):
        bits = BITS[kind[-1]]
        a, b = (self.get(operand, bits) for operand in operands[1:])
        if kind[-1][0] == "s":
            a, b = _signed(a, bits), _signed(b, bits)
        compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
                   "gt": np.greater, "ge": np.greater_equal}  # fmt: skip
        self.registers[operands[0]] = compare[kind[1]](a, b)

    def arithmetic(self, kind, operands, function):
        bits = BITS[kind[-1]]
        values = [_signed(self.get(operand, bits), bits) for operand in operands[1:]]
        wide = 2 * bits if "wide" in kind else bits
        self.registers[operands[0]] = _cut(function(*values), wide)

    def do_add(self, kind, operands):
        self.arithmetic(kind, operands, lambda a, b: a + b)

    def do_sub(self, kind, operands):
        self.arithmetic(kind, operands, lambda a, b: a - b)

    def do_mul(self, kind, operands):
        self.arithmetic(kind, operands, lambda a, b: a * b)

    def do_mad(self, kind, operands):
        self.arithmetic(kind, operands, lambda a, b, c: a * b + c)

    def do_and(self, kind, operands):
        self.arithmetic(kind, operands, lambda a, b: a & b)

    def do_or(self, kind, operands):
        self.arithmetic(kind, operands, lambda a, b: a | b)

    def do_shl(self, kind, operands):
        self.arithmetic(kind, operands, lambda a, b: a << b)

    # ---- conversions

    def do_cvt(self, kind, operands):
        to, values = operands[0], [self.get(operand) for operand in operands[1:]]
        target, source = kind[-2], kind[-1]
        if target in BITS and source in BITS:  # integers
            value = values[0]
            if source[0] == "s":
                value = _signed(value, BITS[source])
            self.registers[to] = _cut(value, BITS[target])
            return
        convert = {
            ("rn", "bf16", "f32"): lambda x: _bfloat16_bits(_float(x)),
            ("rn", "f16", "f32"): lambda x: _half_bits(_float(x)),
            ("f32", "f16"): lambda x: _float_bits(_half(x)),
            # d = {a, b}: the first source goes into the upper half.
            ("rn", "bf16x2", "f32"): lambda a, b: (
                _bfloat16_bits(_float(a)) << np.uint64(16) | _bfloat16_bits(_float(b))
            ),
            ("rn", "f16x2", "f32"): lambda a, b: (
                _half_bits(_float(a)) << np.uint64(16) | _half_bits(_float(b))
            ),
            # Nearest, ties away from zero, in the upper 19 bits.
            ("rna", "tf32", "f32"): lambda x: np.where(
                np.isfinite(_float(x)), (x + np.uint64(0x1000)) & np.uint64(0xFFFFE000), x
            ),
        }
        if tuple(kind[1:]) not in convert:
            raise NotImplementedError(f"the PTX instruction {'.'.join(kind)} is not known here")
        self.registers[to] = convert[tuple(kind[1:])](*values)

    def do_ex2(self, kind, operands):
        assert kind == ["ex2", "approx", "ftz", "f32"]
        x = _float(self.get(operands[1])).astype(np.float64)
        with np.errstate(over="ignore"):
            y = np.exp2(x).astype(np.float32)
        self.registers[operands[0]] = _float_bits(np.where(np.abs(y) < 2.0**-126, 0, y))

    # ---- copies and matrices

    def do_cp(self, kind, operands):
        if kind == ["cp", "async", "cg", "shared", "global"]:
            to, source, size, n = operands
            assert size == "16", "cp.async.cg copies 16 bytes"
            self.copies.append((self.address(to), self.address(source), self.get(n)))
        elif kind == ["cp", "async", "wait_group"]:
            for to, source, n in self.copies:
                for lane in range(LANES):
                    count = int(n[lane])
                    memory, at = self.bytes_at(source[lane], count)
                    data = memory[at : at + count] + bytes(16 - count)
                    memory, at = self.bytes_at(to[lane], 16)
                    memory[at : at + 16] = data
            self.copies = []
        else:
            assert kind == ["cp", "async", "commit_group"], kind

    def do_ldmatrix(self, kind, operands):
        assert kind[1:5] == ["sync", "aligned", "m8n8", "x4"] and kind[-2:] == ["shared", "b16"]
        address = self.address(operands[1])
        rows = np.zeros((4, 8, 8), np.uint64)
        for lane in range(LANES):  # lane 8 i + r has the address of row r of matrix i
            memory, at = self.bytes_at(address[lane], 16)
            rows[lane // 8, lane % 8] = np.frombuffer(bytes(memory[at : at + 16]), np.uint16)
        if "trans" in kind:
            rows = rows.transpose(0, 2, 1)
        lane = np.arange(LANES)
        for i, register in enumerate(_names(operands[0])):
            low, high = (rows[i, lane // 4, 2 * (lane % 4) + j] for j in (0, 1))
            self.registers[register] = low | high << np.uint64(16)

    def do_mma(self, kind, operands):
        shape, types = kind[3], kind[6:]
        assert kind[4:6] == ["row", "col"] and types == ["f32", types[1], types[1], "f32"]
        k = {"m16n8k16": 16, "m16n8k8": 8}[shape]
        a, b, c = ([self.get(name) for name in _names(operand)] for operand in operands[1:])
        convert = {"bf16": _bfloat16, "f16": _half}.get(types[1])
        left, right, total = np.zeros((16, k)), np.zeros((k, 8)), np.zeros((16, 8))
        for lane in range(LANES):
            group, within = lane // 4, lane % 4
            for i in range(4):
                row = group + 8 * (i % 2)
                if convert is None:  # tf32: one value a register
                    left[row, within + 4 * (i // 2)] = _float(a[i][lane : lane + 1])[0]
                else:
                    for j, value in enumerate(_halves(a[i][lane : lane + 1], convert)):
                        left[row, 2 * within + j + 8 * (i // 2)] = value[0]
                total[group + 8 * (i // 2), 2 * within + i % 2] = _float(c[i][lane : lane + 1])[0]
            for i in range(2):
                if convert is None:
                    right[within + 4 * i, group] = _float(b[i][lane : lane + 1])[0]
                else:
                    for j, value in enumerate(_halves(b[i][lane : lane + 1], convert)):
                        right[2 * within + j + 8 * i, group] = value[0]
        total += left @ right
        for i, register in enumerate(_names(operands[0])):
            values = [total[n // 4 + 8 * (i // 2), 2 * (n % 4) + i % 2] for n in range(LANES)]
            self.registers[register] = _float_bits(np.array(values))


def _split(operands):
    """At the commas outside braces and brackets."""
    return re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", operands.replace(" ", ""))


def _names(operand):
    return operand.strip("{}").split(",")
