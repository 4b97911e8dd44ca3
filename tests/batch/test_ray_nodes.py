"""A Ray cluster of two machines, which are two sets of Ray's processes on this one."""

import pytest

from laserrec.batch import engine as batch
from laserrec.batch import ray_engine
from laserrec.batch.engine import BatchSettings, Job
from laserrec.batch.ray_engine import Cluster

pytestmark = pytest.mark.filterwarnings("ignore::laserrec.data.losses.LossWarning")
_SMALL = {"num_cpus": 1, "object_store_memory": 2**27}


@pytest.fixture
def address(monkeypatch):
    """Of two machines with a CPU each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster as Machines

    machines = Machines(initialize_head=True, head_node_args={**_SMALL, "include_dashboard": False})
    try:
        machines.add_node(**_SMALL)
        machines.wait_for_nodes()
        yield machines.address
    finally:
        machines.shutdown()


def test_two_machines_share_the_parts(address, folder, histories, tmp_path, monkeypatch):
    noted = tmp_path / "machines"
    noted.mkdir()

    class Noted(ray_engine._Writer):
        def __call__(self, row):
            import ray

            (noted / ray.get_runtime_context().get_node_id()).touch()
            return super().__call__(row)

    monkeypatch.setattr(ray_engine, "_Writer", Noted)
    mine, theirs = (Job(folder, histories, tmp_path / name, BatchSettings(3, chunk=4)) for name in ("mine", "theirs"))
    numbers = batch.run(mine, progress=False)
    assert ray_engine.run(theirs, Cluster(address=address, workers=2), progress=False) == numbers
    assert len(list(noted.iterdir())) == 2
    written = [{f.name: f.read_bytes() for f in job.out.glob("part-*")} for job in (mine, theirs)]
    assert written[0] == written[1] and len(written[0]) == 100
