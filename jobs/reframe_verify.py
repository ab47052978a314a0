"""ReFrame's test of a stack: all checks of `torchreg verify`, and the bandwidth and latency of its collectives.

    reframe -C SITE.py -c jobs/reframe_verify.py -r                                  # the system's partitions, 2 nodes
    reframe -C SITE.py -c jobs/reframe_verify.py -r -S num_nodes=8 -S options=--quick -S ranks_per_node=4

torchreg has to be on the PATH of the job, as by the site's `prepare_cmds` or -S 'modules=...'. ReFrame 4.
"""

import json

import reframe as rfm
import reframe.utility.sanity as sn
from reframe.core.builtins import run_before, sanity_function, variable


@rfm.simple_test
class TorchregVerify(rfm.RunOnlyRegressionTest):
    """Does this stack train correctly on several nodes, and how fast are its collectives?"""

    descr = "torchreg verify: known answers for launcher, MPI, backend and torch"
    valid_systems = ["*"]  # noqa: RUF012 - ReFrame's own variables
    valid_prog_environs = ["*"]  # noqa: RUF012
    num_nodes = variable(int, value=2)
    ranks_per_node = variable(int, value=4)
    options = variable(str, value="")
    executable = "torchreg"
    maintainers = ["torchreg"]  # noqa: RUF012

    @run_before("run")
    def start_as_training_would(self):
        """One rank for each device."""
        self.num_tasks = self.num_nodes * self.ranks_per_node
        self.num_tasks_per_node = self.ranks_per_node
        self.executable_opts = ["verify", "--json", *self.options.split()]

    @sanity_function
    def every_check_passes(self):
        """Those that fail are named in ReFrame's report. `verify --json` prints one line."""
        line = sn.evaluate(sn.extractsingle(r'^(\{.*"record".*\})\s*$', self.stdout, 1))
        self.checks = json.loads(line)["checks"]
        failed = [f"{check['area']}: {check['name']}" for check in self.checks if check["status"] == "FAIL"]
        return sn.assert_false(failed, msg=f"failed: {', '.join(failed)}")

    @run_before("performance")
    def report_collectives(self):
        """The shortest message's time, and the bus bandwidth of the longest one."""
        for check in self.checks:
            if check["timings"]:
                name, first, last = check["name"].replace(" ", "_"), check["timings"][0], check["timings"][-1]
                latency, bandwidth = sn.defer(first["median_s"] * 1e6), sn.defer(last["bus_bytes_per_s"] / 1e9)
                self.perf_variables[f"{name}_latency"] = sn.make_performance_function(latency, "us")
                self.perf_variables[f"{name}_bus"] = sn.make_performance_function(bandwidth, "GB/s")
