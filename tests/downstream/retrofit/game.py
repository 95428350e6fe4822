"""A game of chess, with all its moves."""

from __future__ import annotations

import json

import chess

from retrofit.still import Still, refusing
from vmmig import RestoreError, Snapshot


class Game(Still):
    """State is the first position and the moves: repetitions and undoing need them all."""

    def __init__(self) -> None:
        self.board = chess.Board()

    def snapshot(self) -> Snapshot:
        start = self.board.root().fen(en_passant="fen")
        moves = [move.uci() for move in self.board.move_stack]
        return self.snapshot_of(game=json.dumps([start, moves]).encode())

    def restore(self, snapshot: Snapshot) -> None:
        (game,) = snapshot.take("game")
        with refusing():
            start, moves = json.loads(game)
            restored = chess.Board(start)
            if not restored.is_valid():
                raise RestoreError(f"{start} cannot be the position of a game")
            for move in moves:
                restored.push_uci(move)
        self.board = restored
