//! File systems that are small enough to be filled.

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
};

use tempfile::TempDir;

/// A small file system in memory; gone when dropped.
#[derive(Debug)]
pub struct Volume(TempDir);

impl Volume {
    /// `None` where this process may not mount.
    ///
    /// # Panics
    /// In CI, which may.
    pub fn mount(options: &str) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir.path());
        let is_mounted = mount.status().is_ok_and(|status| status.success());
        assert!(is_mounted || std::env::var_os("CI").is_none(), "CI may mount");
        is_mounted.then(|| Self(dir))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // A process that has just been killed may hold it for a moment: then it goes when that is
        // over.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// Puts a file of that size where there may be room for it.
///
/// # Panics
/// When there is none.
pub fn fill(path: &Path, bytes: usize) {
    fs::write(path, vec![1; bytes]).unwrap();
    File::open(path).unwrap().sync_all().unwrap();
}
