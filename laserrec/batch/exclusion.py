"""What `laserrec batch` must not recommend: items that were named, and a table of items."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from laserrec.batch.source import Source
from laserrec.data.clean import as_id, ids
from laserrec.data.door import read_histories
from laserrec.data.files import FileOptions, Table, header_hint
from laserrec.data.losses import Losses, tell_items_not_barred, tell_users_not_barred
from laserrec.data.tables import checked, read_listed
from laserrec.util.errors import UserError

_LOOKED_AT = 100_000


class Exclusions:
    """As rows of the catalogue. named: item ids that nobody is recommended; file: a table of user_id and item_id, or
    item_id alone for all users; known: item id -> row. Raises UserError for a file of another shape."""

    def __init__(self, named: tuple[str, ...], file: Path | None, reading: FileOptions, known: Mapping[str, int]):
        self._known, self._file = known, file
        self._lists: dict[str, list[str]] = {"exclude": [name for item in named if (name := as_id(item)) is not None]}
        """Item ids that nobody is recommended, by what names them."""
        self._of_users, self._by_user = Losses(), {}
        if file is not None:
            self._read(file, read_listed(file, reading))
        rows = [known[name] for name in chain(*self._lists.values()) if name in known]
        self._everyone = np.array(rows, dtype=np.int64)

    def _read(self, file: Path, table: Table) -> None:
        columns = table.frame.columns
        if "user_id" in columns and table.frame.height:
            asked = read_histories(checked(file, table), self._known, "drop", tell=False)
            self._of_users = asked.lost
            self._by_user = {str(user): np.array(rows, dtype=np.int64)
                             for user, rows in zip(asked.users, asked.rows, strict=True)}
        elif "item_id" in columns:
            self._lists[str(file)] = ids(table.frame["item_id"]).drop_nulls().to_list()
        else:
            raise UserError(f"{file}: give the columns user_id and item_id, or item_id alone; there are: "
                            f"{', '.join(columns)}{header_hint(columns)}")

    def of(self, user: Any) -> np.ndarray | None:
        """Rows that this user is not recommended, if there are any."""
        rows = np.concatenate([self._everyone, self._by_user.get(str(user), self._everyone[:0])])
        return rows if len(rows) else None

    def tell(self, source: Source) -> None:
        """Warns where a list or the file bars nothing, although it holds something. source: the histories."""
        for what, named in self._lists.items():
            tell_items_not_barred(what, named, self._known)
        lost = self._of_users
        if lost.unknown == lost.items:
            tell_items_not_barred(str(self._file), lost.examples, self._known)
        ours: list[str] = []
        for names in source.names() if self._by_user else ():
            if names.is_in(list(self._by_user)).any():
                return
            ours += names[: _LOOKED_AT - len(ours)].to_list()
        tell_users_not_barred(str(self._file), list(self._by_user), ours)
