"""One table through every door of the whole product: what arrives at the model is the same, and so are the answers."""

import asyncio
import contextlib
import io
import json
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import httpx
import polars as pl
import pytest
import tiny
from doors import FILES, FRAMES, INDEX, NAMELESS, expected, lists, tables, written
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from laserrec.cli import main as cli
from laserrec.data.clean import as_id, ids, texts
from laserrec.data.losses import LossWarning
from laserrec.data.raw import from_frames
from laserrec.recommender.recommender import LaserRecommender
from laserrec.server.app import make_app
from laserrec.server.service import Service
from laserrec.server.settings import Limits
from laserrec.util.errors import UserError

EXAMPLES, K = 15, 3
often = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(llm_folder, tmp_path_factory):
    """A model whose catalogue is INDEX: rows are sorted ids."""
    out, names = tmp_path_factory.mktemp("doors"), sorted(INDEX)
    items = tiny.items(len(names)).with_columns(item_id=pl.Series(names))
    acts = pl.DataFrame([(f"u{u}", names[(u + step) % len(names)], step) for u in range(12) for step in range(5)],
                        schema=["user_id", "item_id", "timestamp"], orient="row")
    tree = tiny.config(llm_folder(), data={"min_item_interactions": 1}, id_model={"max_epochs": 1, "max_history": 12},
                       prompt={"layout": "text_first", "max_items": 12}, head={"whiten_dims": 8},
                       train={"stage_one_epochs": 1, "stage_two_epochs": 0})
    LaserRecommender.fit(acts, items.drop("item"), tree, out, progress=False)
    return out / "model"


@pytest.fixture(scope="module")
def model(folder):
    return LaserRecommender.from_pretrained(folder)


@contextlib.contextmanager
def arriving(model):
    """Item ids of every history that reaches the model, in the order of arrival."""
    seen, rank = [], model.rank

    def spy(asks):
        seen.extend([model.item_ids(ask.history) for ask in asks])
        return rank(asks)

    with mock.patch.object(model, "rank", spy), warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)
        yield seen


def names(table):
    """{user: item ids} as they shall arrive."""
    ids = list(INDEX)
    return {user: [ids[row] for row in rows] for user, rows in expected(table).items()}


def best(frame):
    """{user: recommended item ids}."""
    rows = frame.drop_nulls("item_id").sort("rank")
    return {str(user): own["item_id"].to_list() for (user,), own in rows.group_by("user_id", maintain_order=True)}


def by_hand(model, want):
    return best(model.recommend({user: ids for user, ids in want.items() if ids}, k=K))


# -- Python ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FRAMES, *NAMELESS])
@often
@given(table=tables())
def test_python(form, table, model):
    want = names(table)
    assume(any(want.values()))
    users = list(want) if form in FRAMES else lists(table)["user_id"].to_list()
    with arriving(model) as seen:
        frame = model.recommend((FRAMES | NAMELESS)[form](table), k=K, unknown="drop")
    frame = frame if isinstance(frame, pl.DataFrame) else pl.from_pandas(frame)
    if form in NAMELESS:
        frame = frame.with_columns(user_id=pl.Series([users[place] for place in frame["user_id"]], dtype=pl.String))
    assert sorted(seen) == sorted(want.values())
    assert best(frame) == by_hand(model, want)


# -- the command line -----------------------------------------------------------------------------------------------


def command(model, *words):
    """Exit code and standard error of a command, which finds the model loaded."""
    out, err = io.StringIO(), io.StringIO()
    with (mock.patch("sys.argv", ["laserrec", *map(str, words)]), contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err), mock.patch.object(LaserRecommender, "from_pretrained",
                                                             lambda *args, **options: model)):
        try:
            cli.main()
        except SystemExit as end:
            return end.code, err.getvalue()
    return 0, err.getvalue()


@pytest.mark.parametrize("form", FILES)
@often
@given(table=tables())
def test_recommend_for_files(form, table, model, folder):
    want = names(table)
    assume(any(want.values()))
    with tempfile.TemporaryDirectory() as place, arriving(model) as seen:
        file, out = written(form, table, Path(place)), Path(place) / "out" / "r.parquet"
        code, err = command(model, "recommend", folder, "--histories", file, "--out", out, "--k", K, "--unknown",
                            "drop")
        assert code == 0, err
        assert sorted(seen) == sorted(want.values())
        assert best(pl.read_parquet(out)) == by_hand(model, want)


@pytest.mark.parametrize("form", FILES)
@often
@given(table=tables())
def test_batch(form, table, model, folder):
    want = names(table)
    assume(any(want.values()))
    table = table.sort("user_id", maintain_order=True)  # a user's rows together
    with tempfile.TemporaryDirectory() as place, arriving(model) as seen:
        file, out = written(form, table, Path(place)), Path(place) / "out"
        code, err = command(model, "batch", folder, file, out, "--k", K, "--chunk", 2, "--quiet")
        assert code == 0, err
        found = pl.concat([pl.read_parquet(part) for part in sorted(out.glob("part-*.parquet"))])
        assert sorted(seen) == sorted(want.values()) and set(found["user_id"]) == set(want)
        assert best(found) == by_hand(model, want)


@often
@given(table=tables())
def test_recommend_for_one_history(table, model, folder):
    for user, want in names(table).items():
        items = dict(lists(table).iter_rows())[user]
        text = ",".join("" if item is None else str(item) for item in items)
        with tempfile.TemporaryDirectory() as place, arriving(model) as seen:
            file = Path(place) / "r.json"
            code, err = command(model, "recommend", folder, f"--history={text}", "--k", K, "--unknown", "drop",
                                "--json", file)
            if not want:
                assert code == 2 and not seen, err
                continue
            assert code == 0 and seen == [want], err
            assert [row["item_id"] for row in json.loads(file.read_text())] == by_hand(model, {"u": want})["u"]


# -- HTTP -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """The service, and (method, path, body) -> answer."""
    with Service.opened(folder, tmp_path_factory.mktemp("state"), Limits(cache=0)) as service:
        app = make_app(service)

        def call(method, path, body=None):
            async def send():
                transport = httpx.ASGITransport(app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                    return await client.request(method, path, json=body)

            return asyncio.run(send())

        yield service, call


def as_json(value):
    """What a caller makes of it in JSON, where there are no decimals."""
    return value if isinstance(value, str | int | float | None) else float(value)


@often
@given(table=tables())
def test_http(table, model, served):
    service, call = served
    for user, items in lists(table).iter_rows():
        want = names(table)[user]
        history = [as_json(item) for item in items if item is not None]  # null is refused with its place
        if not history:
            continue
        with arriving(service.model) as seen:
            answer = call("POST", "/v1/recommend", {"history": history, "k": K})
        if not want:
            assert answer.status_code == 422 and not seen
            continue
        assert seen == [want]
        assert [item["item_id"] for item in answer.json()["items"]] == by_hand(model, {"u": want})["u"]
        assert answer.json()["unknown"] == [as_id(i) for i in history if as_id(i) not in INDEX]


# -- new items ------------------------------------------------------------------------------------------------------

TEXTS = st.sampled_from(["Drill", "Dr&amp;ill", " a\nb ", "<br>", "<b>x</b> &lt;3", '"q", z', "ä;ö", "", "7", None])
TEXT_COLUMNS = st.one_of(
    st.lists(TEXTS, min_size=3, max_size=3).map(lambda v: pl.Series(v, dtype=pl.String)),
    st.lists(st.lists(TEXTS, max_size=3), min_size=3, max_size=3).map(lambda v: pl.Series(v, dtype=pl.List(pl.String))),
    st.lists(TEXTS, min_size=3, max_size=3).map(lambda v: pl.Series([{"name": t, "id": 5} for t in v])),
    st.lists(TEXTS, min_size=3, max_size=3).map(lambda v: pl.Series([[[t], ["x"]] for t in v])),
    st.lists(st.integers(0, 9), min_size=3, max_size=3).map(pl.Series))
NEW_IDS = st.sampled_from([
    pl.Series(["n1", " n2\t", "70.0"]), pl.Series([70, 71, 72]), pl.Series([70.0, 71.5, 72.0]),
    pl.Series(["70.00", "71.00", "72.00"]).cast(pl.Decimal(10, 2)), pl.Series(["n1", "n2", "n1 "]),
    pl.Series(["n1", "", "n2"])])


@st.composite
def new_items(draw):
    return pl.DataFrame({"item_id": draw(NEW_IDS), "title": draw(TEXT_COLUMNS), "category": draw(TEXT_COLUMNS)})


def taken(model, add):
    """(item_id, title, brand, category) of what `add` brought into the catalogue, which is then as before; None where
    it was refused."""
    before = len(model.items)
    try:
        add()
    except UserError:
        assert len(model.items) == before
        return None
    new = model.items[before:].drop("item")
    model.remove_items(new["item_id"].to_list())
    return new.rows()


def prepared(items):
    """As `fit` reads them; None where `add_items` must refuse them."""
    try:
        found = from_frames(pl.DataFrame({"user_id": ["u"], "item_id": ["a"]}), items)
    except UserError:
        return None
    whole = found.items["title"].null_count() == 0 and not found.notes["duplicate_item_rows"]
    return found.items.select("item_id", "title", "brand", "category").rows() if whole else None


ADDED = {"polars": lambda items: items, "lazy": lambda items: items.lazy(), "arrow": lambda items: items.to_arrow(),
         "pandas": lambda items: items.to_pandas(), "pandas objects": lambda items: items.to_pandas().astype(object),
         "dict of columns": lambda items: items.to_dict(as_series=False),
         "list of dicts": lambda items: items.to_dicts()}


@pytest.mark.parametrize("form", ADDED)
@often
@given(items=new_items())
def test_new_items_in_python(form, items, model):
    assert taken(model, lambda: model.add_items(ADDED[form](items))) == prepared(items)


def once(items):
    """Without rows that repeat another one: over HTTP the same item may be sent twice."""
    clean = pl.DataFrame([ids(items["item_id"]), texts(items["title"]), texts(items["category"])])
    return items.filter(clean.select(pl.struct(pl.all()).is_first_distinct()).to_series())


@often
@given(items=new_items())
def test_new_items_over_http(items, served):
    service, call = served
    rows = [{name: as_json(v) if name == "item_id" else v for name, v in row.items()} for row in items.to_dicts()]
    want, before = prepared(once(items)), len(service.model.items)
    answer = call("POST", "/v1/items", {"items": rows})
    if want is None:
        assert answer.status_code in (409, 422) and len(service.model.items) == before
        return
    assert answer.status_code == 201, answer.text
    listed = [call("GET", f"/v1/items/{item_id}").json() for item_id, *_ in want]
    assert [tuple(item.values()) for item in listed] == want
    for item_id, *_ in want:
        assert call("DELETE", f"/v1/items/{item_id}").status_code == 200
