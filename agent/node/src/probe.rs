//! Facts about the machine.

use std::{path::Path, process::Command, thread, time::Duration};

use exo_crds::{Compute, MemoryStatus, Quantity};
use sysinfo::{CpuRefreshKind, DiskRefreshKind, Disks, MemoryRefreshKind, RefreshKind, System};
use tokio::sync::watch;

/// Between two looks: as often as heartbeats carry what they find.
const PERIOD: Duration = Duration::from_secs(2);

/// What does not change while the agent runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Processor name as the operating system gives it.
    pub(crate) chip: Option<String>,
    pub(crate) os_version: Option<String>,
    pub(crate) compute: Option<Compute>,
    /// The GPU's working-set limit, bytes; all memory where absent.
    gpu_limit_bytes: Option<u64>,
}

/// Looks once; may take a moment.
pub(crate) fn facts() -> Facts {
    let macos = cfg!(target_os = "macos");
    let chip =
        System::new_with_specifics(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()))
            .ok()
            .and_then(|system| system.cpus().first().map(|cpu| cpu.brand().trim().to_owned()))
            .filter(|brand| !brand.is_empty());
    let sysctl = if macos { sysctl() } else { None };
    Facts {
        chip,
        os_version: System::long_os_version().ok(),
        compute: Some(if macos { Compute::Metal } else { Compute::Cpu }),
        gpu_limit_bytes: sysctl.as_deref().and_then(gpu_limit_bytes),
    }
}

/// Looks now and then until nobody wants to know, on a thread of its own: a disk that hangs then
/// holds up nothing but its own figure, not even the end of the process.
pub(crate) fn watch<T: Send + Sync + 'static>(
    what: &str,
    look: impl Fn() -> Option<T> + Send + 'static,
) -> watch::Receiver<Option<T>> {
    let (sender, receiver) = watch::channel(None);
    let looking = move || {
        while !sender.is_closed() {
            sender.send_replace(look());
            thread::sleep(PERIOD);
        }
    };
    if let Err(error) = thread::Builder::new().name(format!("probe-{what}")).spawn(looking) {
        tracing::warn!(%error, what, "no thread for a probe");
    }
    receiver
}

/// `sysctl`'s answer about memory; keys it doesn't know are left out of it.
fn sysctl() -> Option<String> {
    let output = Command::new("/usr/sbin/sysctl")
        .args(["hw.memsize", "iogpu.wired_limit_mb"])
        .output()
        .ok()?;
    String::from_utf8(output.stdout).ok()
}

/// What Metal lets one process hold: the limit that an administrator set, otherwise 75 % of memory,
/// which is macOS's own rule for machines with more than 32 GiB and near it below.
fn gpu_limit_bytes(sysctl: &str) -> Option<u64> {
    let value = |key: &str| -> Option<u64> {
        let line = sysctl.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim_start_matches([':', ' ', '=']).trim().parse().ok()
    };
    let limit_mib = value("iogpu.wired_limit_mb").filter(|limit| *limit > 0);
    match limit_mib {
        Some(limit) => Some(limit << 20),
        None => value("hw.memsize").map(|total| total / 4 * 3),
    }
}

/// What the operating system says about memory right now, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    total: u64,
    available: u64,
    /// Limit of the control group and what of it is in use and can't be reclaimed.
    group: Option<(u64, u64)>,
}

fn reading() -> Option<Reading> {
    let kind = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(kind).ok()?;
    Some(Reading {
        total: system.total_memory(),
        available: system.available_memory(),
        // Page cache counts as free: it is given back when needed.
        group: system.cgroup_limits().map(|limits| (limits.total_memory, limits.rss)),
    })
}

/// Memory now. `held_bytes` is what runners here report to hold.
pub(crate) fn memory(facts: &Facts, held_bytes: u64) -> Option<MemoryStatus> {
    reading().map(|reading| memory_status(facts, reading, held_bytes))
}

fn memory_status(facts: &Facts, reading: Reading, held_bytes: u64) -> MemoryStatus {
    let group = reading.group.filter(|(limit, _)| *limit > 0 && *limit < reading.total);
    let total = group.map_or(reading.total, |(limit, _)| limit);
    let available = group.map_or(reading.available, |(limit, used)| {
        reading.available.min(limit.saturating_sub(used))
    });
    let usable = facts.gpu_limit_bytes.map_or(total, |limit| limit.min(total));
    let free = match facts.gpu_limit_bytes {
        Some(_) => available.min(usable.saturating_sub(held_bytes)),
        None => available,
    };
    MemoryStatus {
        total: Quantity::from_bytes(total).rounded(),
        free: Quantity::from_bytes(free).rounded(),
        total_bytes: total,
        usable_bytes: usable,
        free_bytes: free,
    }
}

/// Free bytes on the disk that holds `path`, or will once it is made.
pub(crate) fn disk_free(path: &Path) -> Option<u64> {
    let path = path.ancestors().find_map(|ancestor| ancestor.canonicalize().ok())?;
    let kind = DiskRefreshKind::nothing().with_storage();
    let disks = Disks::new_with_refreshed_list_specifics(kind).ok()?;
    disks
        .iter()
        .filter(|disk| path.starts_with(disk.mount_point()))
        .max_by_key(|disk| disk.mount_point().components().count())
        .map(sysinfo::Disk::available_space)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_gpu_limit_follows_sysctl() {
        // `sysctl hw.memsize iogpu.wired_limit_mb` of a 64 GiB Mac, as delivered and with a limit.
        let delivered = "hw.memsize: 68719476736\niogpu.wired_limit_mb: 0\n";
        assert_eq!(gpu_limit_bytes(delivered), Some(48 * GIB));
        let raised = "hw.memsize: 68719476736\niogpu.wired_limit_mb: 57344\n";
        assert_eq!(gpu_limit_bytes(raised), Some(56 * GIB));
        // Before macOS 14 the second key does not exist.
        assert_eq!(gpu_limit_bytes("hw.memsize: 17179869184\n"), Some(12 * GIB));
        assert_eq!(gpu_limit_bytes(""), None);
        assert_eq!(gpu_limit_bytes("hw.memsize: many\n"), None);
    }

    fn check(limit: Option<u64>, reading: Reading, held: u64, usable_and_free: (u64, u64)) {
        let facts = Facts { gpu_limit_bytes: limit, ..Facts::default() };
        let status = memory_status(&facts, reading, held);
        assert_eq!((status.usable_bytes, status.free_bytes), usable_and_free, "{reading:?}");
    }

    #[test]
    fn free_memory_is_what_every_limit_leaves() {
        let mac = Reading { total: 64 * GIB, available: 50 * GIB, group: None };
        check(Some(48 * GIB), mac, 0, (48 * GIB, 48 * GIB));
        check(Some(48 * GIB), mac, 20 * GIB, (48 * GIB, 28 * GIB));
        check(None, mac, 20 * GIB, (64 * GIB, 50 * GIB));
        let group = |limit, used| Reading { group: Some((limit, used)), ..mac };
        check(None, group(16 * GIB, 2 * GIB), 0, (16 * GIB, 14 * GIB));
        check(None, group(u64::MAX, 2 * GIB), 0, (64 * GIB, 50 * GIB));
        check(None, group(60 * GIB, 0), 0, (60 * GIB, 50 * GIB));
    }

    #[tokio::test]
    async fn a_look_that_hangs_leaves_the_last_value_to_be_read() {
        let (finish, hung) = std::sync::mpsc::channel::<u32>();
        let mut values = watch("test", move || hung.recv().ok());
        assert_eq!(*values.borrow(), None);
        finish.send(7).unwrap();
        values.wait_for(|value| *value == Some(7)).await.unwrap();
        // The next look never ends.
        assert_eq!(*values.borrow(), Some(7));
    }

    #[test]
    fn this_machine_has_memory_and_a_disk() {
        let facts = facts();
        let memory = memory(&facts, 0).unwrap();
        assert!(memory.free_bytes > 0 && memory.free_bytes <= memory.total_bytes);
        assert!(memory.usable_bytes <= memory.total_bytes);
        assert!(disk_free(Path::new("/no/such/folder/yet")).is_some());
    }
}
