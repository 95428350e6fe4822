"""Every component, and several of them as one machine, by the laws of vmmig.testing."""

from __future__ import annotations

import struct

import wasmtime
from hypothesis import strategies as st
from retrofit.database import Database
from retrofit.game import Game
from retrofit.mos6502 import Mos6502
from retrofit.randomness import Dice, Noise
from retrofit.regulator import Regulator
from retrofit.riscv import PAGE_BYTES, RAM, REGISTERS, RiscV
from retrofit.wasm import Wasm

from vmmig import Composite
from vmmig.testing import contract, corpus

bytes_ = st.integers(0, 255)


OPCODES = [
    *(0xA9, 0xA2, 0xA0, 0x69, 0xE9, 0x49, 0xC9),  # lda ldx ldy adc sbc eor cmp, immediate
    *(0x85, 0x95, 0x65, 0xE6, 0xD0, 0x90, 0x20),  # sta sta,x adc inc bne bcc jsr
    *(0x08, 0x28, 0x48, 0x68, 0x60, 0x40, 0x00),  # php plp pha pla rts rti brk
    *(0xF8, 0xD8, 0x38, 0x18, 0x58, 0x78, 0xB8),  # sed cld sec clc cli sei clv
]


def run(cpu: Mos6502, code: list[int]) -> None:
    pc = cpu.mpu.pc & 0xFF00
    cpu.mpu.memory[pc : pc + len(code)] = code
    cpu.mpu.pc = pc
    cpu.step(len(code))


TestMos6502 = contract(
    Mos6502,
    operations={
        "step": [st.integers(1, 20)],
        "run": [run, st.lists(st.sampled_from(OPCODES) | bytes_, min_size=1, max_size=9)],
        "irq": lambda cpu: cpu.mpu.irq(),
        "nmi": lambda cpu: cpu.mpu.nmi(),
        "reset": lambda cpu: cpu.mpu.reset(),
    },
    observe=lambda cpu: (repr(cpu.mpu), cpu.mpu.processorCycles, bytes(cpu.mpu.memory)),
)


TestDatabase = contract(
    Database,
    operations={
        "execute": [
            st.sampled_from(
                [
                    "CREATE TABLE log (id INTEGER PRIMARY KEY AUTOINCREMENT, text)",
                    "CREATE INDEX by_text ON log (text)",
                    "DROP TABLE log",
                    "DELETE FROM log WHERE id % 2",
                    "SELECT id, text FROM log ORDER BY text, id",
                    "VACUUM",
                ]
            )
        ],
        "insert": [
            lambda db, text: db.execute("INSERT INTO log (text) VALUES (?) RETURNING id", (text,)),
            st.none() | st.text() | st.integers(-(2**63), 2**63 - 1) | st.binary(),
        ],
    },
    observe=lambda db: list(db.connection.iterdump()),
)


TestDice = contract(
    Dice,
    operations={
        "throw": lambda dice: dice.random.randint(1, 6),
        "gauss": lambda dice: dice.random.gauss(),
        "shuffle": [lambda dice, cards: dice.random.shuffle(cards), st.just([1, 2, 3])],
        "seed": [lambda dice, seed: dice.random.seed(seed), st.integers()],
    },
    observe=lambda dice: dice.random.getstate(),
)

TestNoise = contract(
    Noise,
    operations={
        "normal": [lambda noise, n: noise.generator.normal(size=n), st.integers(0, 9)],
        "half_word": lambda noise: noise.generator.integers(100, dtype="uint32"),
        "spawn": lambda noise: noise.generator.spawn(1)[0].random(),
    },
    observe=Noise.state,
)


PROGRAM = struct.pack(
    "<13I",
    0x00100513,  #       li   a0, 1
    0x00002637,  #       lui  a2, 2            # the RAM
    0x00D51293,  # next: slli t0, a0, 13       # a0: Marsaglia's xorshift of 64 bits
    0x00554533,  #       xor  a0, a0, t0
    0x00755293,  #       srli t0, a0, 7
    0x00554533,  #       xor  a0, a0, t0
    0x01151293,  #       slli t0, a0, 17
    0x00554533,  #       xor  a0, a0, t0
    0x7F85F293,  #       andi t0, a1, 0x7f8    # a1: where in the ring of 256 words
    0x00C282B3,  #       add  t0, t0, a2
    0x00A2B023,  #       sd   a0, 0(t0)
    0x00858593,  #       addi a1, a1, 8
    0xFD9FF06F,  #       j    next
)


def riscv() -> RiscV:
    return RiscV(PROGRAM)


def xorshift(x: int) -> int:
    x ^= x << 13 & 2**64 - 1
    x ^= x >> 7
    return x ^ (x << 17 & 2**64 - 1)


def test_the_program_runs() -> None:
    cpu = riscv()
    cpu.step(2 + 11 * 3)
    first, second, third = struct.unpack("<3Q", cpu.engine.mem_read(RAM, 24))
    assert (first, second, third) == (xorshift(1), xorshift(first), xorshift(second))


TestRiscV = contract(
    riscv,
    operations={
        "step": [st.integers(1, 50)],
        "poke": [
            lambda cpu, at, byte: cpu.engine.mem_write(RAM + at, bytes([byte])),
            st.integers(0, PAGE_BYTES - 1),
            bytes_,
        ],
        "set": [
            lambda cpu, n, value: cpu.engine.reg_write(REGISTERS[n], value),
            st.integers(1, 31),
            st.integers(0, 2**64 - 1),
        ],
    },
    observe=lambda cpu: (
        [cpu.engine.reg_read(register) for register in REGISTERS],
        cpu.engine.mem_read(RAM, PAGE_BYTES),
    ),
)


ENGINE = wasmtime.Engine()
BANK = wasmtime.Module(
    ENGINE,
    """
    (module
      (memory (export "memory") 1 3)
      (global $calls (export "calls") (mut i32) (i32.const 0))
      (global $mean (export "mean") (mut f64) (f64.const 0))
      (func (export "deposit") (param $account i32) (param $amount i64) (result i64)
        (global.set $calls (i32.add (global.get $calls) (i32.const 1)))
        (global.set $mean (f64.div
          (f64.add (global.get $mean) (f64.convert_i64_s (local.get $amount))) (f64.const 2)))
        (i64.store (local.get $account)
          (i64.add (i64.load (local.get $account)) (local.get $amount)))
        (i64.load (local.get $account)))
      (func (export "grow") (result i32) (memory.grow (i32.const 1))))
    """,
)


def bank() -> Wasm:
    return Wasm(ENGINE, BANK)


TestBank = contract(
    bank,
    operations={
        "deposit": [
            lambda wasm, account, amount: wasm.call("deposit", account, amount),
            st.integers(0, 2 * 0x10000),
            st.integers(-(2**63), 2**63 - 1),
        ],
        "grow": lambda wasm: wasm.call("grow"),
    },
    observe=lambda wasm: (wasm.exports["memory"].read(wasm.store), wasm.globals()),
)


def play(game: Game, choice: int) -> str:
    moves = sorted(game.board.legal_moves, key=str)
    move = moves[choice % len(moves)]
    san = game.board.san(move)
    game.board.push(move)
    return san


def observe_game(game: Game) -> object:
    board = game.board
    return board.fen(en_passant="fen"), board.move_stack, board.is_repetition(2), board.outcome()


TestGame = contract(
    Game,
    operations={"play": [play, st.integers(0, 99)], "undo": lambda game: str(game.board.pop())},
    observe=observe_game,
)


TestRegulator = contract(
    Regulator,
    operations={
        "control": [
            lambda regulator, heat, dt: regulator.pid(heat, dt),
            st.floats(-50, 50),
            st.floats(0.01, 10),
        ],
        "control_now": [lambda regulator, heat: regulator.pid(heat), st.floats(-50, 50)],
        "set": [
            lambda regulator, heat: setattr(regulator.pid, "setpoint", heat),
            st.floats(-50, 50),
        ],
    },
    observe=lambda regulator: (regulator.state(), regulator.pid.components),
    runs_by_itself=True,
)


def bench() -> Composite:
    return Composite("bench", [Mos6502(), Dice(), Game()], depends_on={"mos6502": ["dice"]})


def run_random_code(bench: Composite, length: int) -> None:
    run(bench.components["mos6502"], [*bench.components["dice"].random.randbytes(length)])


def observe_bench(bench: Composite) -> object:
    version, words, gauss = bench.components["dice"].random.getstate()
    return {
        "mos6502": repr(bench.components["mos6502"].mpu),
        "dice": [version, words, gauss],
        "game": str(observe_game(bench.components["game"])),
    }


def bench_after_a_while() -> Composite:
    busy = bench()
    for choice in range(9):
        run_random_code(busy, 8)
        play(busy.components["game"], choice)
    return busy


TestBench = contract(
    bench,
    operations={
        "run_random_code": [run_random_code, st.integers(1, 16)],
        "play": [lambda bench, choice: play(bench.components["game"], choice), bytes_],
    },
    observe=observe_bench,
)

TestBenchCorpus = corpus(
    bench,
    "corpus",
    {"new": bench, "after-a-while": bench_after_a_while},
    observe=observe_bench,
    release="1.0",
)
