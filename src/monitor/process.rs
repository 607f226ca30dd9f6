//! Metrics of this process, with the names that all Prometheus clients use.

use std::fmt;

use procfs::process::{Process, Stat};
use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};
use rustix::process::{Resource, getrlimit};

use super::exposition::{BYTES, Exposition, SECONDS};

/// Reads `/proc/self` at each scrape. What cannot be read is left out.
#[derive(Debug)]
pub(super) struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut exposition = Exposition(encoder);
        let Ok(process) = Process::myself() else { return Ok(()) };
        if let Ok(stat) = process.stat() {
            encode_stat(&mut exposition, &stat)?;
        }
        if let Ok(open) = process.fd_count() {
            exposition.gauge("process_open_fds", None, "Open file descriptors", open as f64)?;
        }
        let Some(max) = getrlimit(Resource::Nofile).current else {
            return Ok(());
        };
        exposition.gauge("process_max_fds", None, "Limit of open file descriptors", max as f64)
    }
}

fn encode_stat(exposition: &mut Exposition<'_>, stat: &Stat) -> fmt::Result {
    let ticks = procfs::ticks_per_second();
    let seconds = |clock_ticks: u64| clock_ticks as f64 / ticks as f64;
    exposition.counter(
        "process_cpu",
        SECONDS,
        "Processor time",
        &seconds(stat.utime + stat.stime),
    )?;
    let resident = stat.rss * procfs::page_size();
    exposition.gauge("process_resident_memory", BYTES, "Memory in use", resident as f64)?;
    exposition.gauge(
        "process_virtual_memory",
        BYTES,
        "Address space in use",
        stat.vsize as f64,
    )?;
    exposition.gauge("process_threads", None, "Threads", stat.num_threads as f64)?;
    let Ok(boot) = procfs::boot_time_secs() else {
        return Ok(());
    };
    let started = boot as f64 + seconds(stat.starttime);
    exposition.gauge("process_start_time", SECONDS, "Time of the start since 1970", started)
}
