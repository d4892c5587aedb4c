//! Where taod keeps its files: whether it can write there, whether others can read it, and whether there is room.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Check, Finding};
use crate::config::Config;
use crate::layout;
use crate::signature::SigningKey;

/// Free bytes and names below which nothing can be relied on, and below which there is reason to look.
const LEAST: Room = Room { bytes: 1 << 30, names: 1_000 };
const SCARCE: Room = Room { bytes: 10 << 30, names: 50_000 };
/// How many files are looked at for a foreign owner, and how deep.
const LOOKED_AT: usize = 20_000;
const DEPTH: usize = 6;

/// Looks at the state folder: there, writable, private, and all of it this user's.
pub(super) fn state(config: &Config) -> Vec<Finding> {
    let dir = &config.state.dir;
    let shown = dir.display();
    let found = match fs::metadata(dir) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return vec![absent(dir)],
        Err(error) => {
            let says = format!("{shown} cannot be looked at: {error}");
            return vec![Finding::failure(Check::State, says, "run taod as the owner of state.dir")];
        }
    };
    if !found.is_dir() {
        let says = format!("{shown} is no folder");
        return vec![Finding::failure(Check::State, says, "set state.dir to a folder for taod's files")];
    }
    let mut findings = Vec::new();
    if let Err(error) = layout::check(dir) {
        let remedy = "install the version that wrote it, or restore a backup (docs/runbooks/restore.md)";
        findings.push(Finding::failure(Check::State, error.to_string(), remedy));
    }
    if let Err(error) = write_in(dir) {
        let remedy = format!("make {shown} writable for user {}, or run taod as user {}", user(), found.uid());
        findings.push(Finding::failure(Check::State, format!("{shown} cannot be written to: {error}"), remedy));
    }
    if found.mode() & 0o007 != 0 {
        let says =
            format!("{shown} holds the text of queries and is open to every user (mode {:o})", found.mode() & 0o777);
        findings.push(Finding::warning(Check::State, says, format!("chmod o-rwx {shown}")));
    }
    findings.extend(owners(dir, found.uid()));
    match findings.is_empty() {
        true => vec![Finding::ok(Check::State, format!("{shown} is writable, private and of one owner"))],
        false => findings,
    }
}

fn absent(dir: &Path) -> Finding {
    let shown = dir.display();
    let Some(parent) = dir.ancestors().skip(1).find(|above| above.is_dir() || above.as_os_str().is_empty()) else {
        return Finding::failure(Check::State, format!("{shown} cannot be made"), "set state.dir to an absolute path");
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    match write_in(parent) {
        Ok(()) => Finding::ok(Check::State, format!("{shown} is not there yet; the first start makes it")),
        Err(error) => {
            let says = format!("{shown} is not there and cannot be made in {}: {error}", parent.display());
            Finding::failure(Check::State, says, format!("make {shown} and give it to user {}", user()))
        }
    }
}

/// Makes a file and removes it.
fn write_in(folder: &Path) -> io::Result<()> {
    let mut file = tempfile::Builder::new().prefix(".taod-doctor-").tempfile_in(folder)?;
    io::Write::write_all(&mut file, b"doctor")?;
    file.as_file().sync_all()?;
    file.close()
}

/// Finds files of another owner, as a command run by root leaves them; the service could not replace them.
fn owners(dir: &Path, owner: u32) -> Option<Finding> {
    let (mut strangers, mut looked_at) = (BTreeMap::<u32, (usize, PathBuf)>::new(), 0);
    let mut folders = vec![(dir.to_path_buf(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Ok(found) = entry.metadata() else { continue };
            looked_at += 1;
            if found.uid() != owner {
                strangers.entry(found.uid()).or_insert((0, entry.path())).0 += 1;
            }
            if found.is_dir() && depth < DEPTH && looked_at < LOOKED_AT {
                folders.push((entry.path(), depth + 1));
            }
        }
    }
    let (uid, (count, first)) = strangers.into_iter().next()?;
    let shown = dir.display();
    let says = format!("{count} files below {shown} belong to user {uid}, not to {owner}, such as {}", first.display());
    Some(Finding::failure(Check::State, says, format!("chown -R {owner} {shown}; run taod's commands as that user")))
}

/// Looks at the room on the disk of each folder that taod writes to.
pub(super) fn disk(config: &Config) -> Vec<Finding> {
    let mut folders = vec![("state.dir", config.state.dir.clone()), ("temporary files", std::env::temp_dir())];
    // A bucket has no end; an unusable location is told by the check of the tables.
    if let Ok(Some(folder)) = config.state.open_tables().map(|tables| tables.root().folder()) {
        folders.push(("the tables", folder));
    }
    let mut by_disk: BTreeMap<u64, Finding> = BTreeMap::new();
    for (what, folder) in folders {
        let Some(there) = folder.ancestors().find_map(|above| Some((above, fs::metadata(above).ok()?))) else {
            continue;
        };
        by_disk.entry(there.1.dev()).or_insert_with(|| judge(what, there.0, Room::of(there.0)));
    }
    by_disk.into_values().collect()
}

pub(super) fn judge(what: &str, folder: &Path, room: io::Result<Room>) -> Finding {
    let shown = folder.display();
    let room = match room {
        Ok(room) => room,
        Err(error) => {
            let says = format!("the disk of {what} ({shown}) cannot be asked for its room: {error}");
            return Finding::warning(Check::Disk, says, "look at `df` there yourself");
        }
    };
    let says = format!("the disk of {what} ({shown}) has {room} left");
    let remedy =
        "make room: lower maintenance.keep_days or the retention of the tables (docs/tables.md), or move state.dir";
    match (room.below(LEAST), room.below(SCARCE)) {
        (true, _) => Finding::failure(Check::Disk, says, remedy),
        (false, true) => Finding::warning(Check::Disk, says, remedy),
        (false, false) => Finding::ok(Check::Disk, says),
    }
}

/// What is left on a disk for this user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) bytes: u64,
    /// Files that can still be made; file systems that do not count them say 0 of 0, which is here `u64::MAX`.
    pub(super) names: u64,
}

impl Room {
    #[expect(unsafe_code, reason = "the standard library has no call for the room on a disk")]
    fn of(folder: &Path) -> io::Result<Room> {
        let path = CString::new(folder.as_os_str().as_bytes())?;
        let mut told = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
        // SAFETY: the path ends with a zero byte, and the struct is ours, large enough, and read only where the call filled it.
        let told = unsafe {
            if libc::statvfs(path.as_ptr(), told.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            told.assume_init()
        };
        let names = if told.f_files == 0 { u64::MAX } else { told.f_favail };
        Ok(Room { bytes: told.f_bavail.saturating_mul(told.f_frsize), names })
    }

    pub(super) fn below(self, other: Room) -> bool {
        self.bytes < other.bytes || self.names < other.names
    }
}

impl std::fmt::Display for Room {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} GiB", self.bytes as f64 / f64::from(1 << 30))?;
        if self.names < SCARCE.names { write!(f, " and {} file names", self.names) } else { Ok(()) }
    }
}

/// Looks at every file of the config that holds a secret, and at the certificates beside them.
pub(super) fn secrets(config: &Config) -> Vec<Finding> {
    let mut files = Vec::new();
    named_files("", &serde_json::to_value(config).unwrap_or_default(), &mut files);
    let findings: Vec<Finding> = files.iter().filter_map(|(key, path)| secret(key, path)).collect();
    match (findings.is_empty(), files.len()) {
        (false, _) => findings,
        (true, 0) => vec![Finding::ok(Check::Secrets, "no file with a secret is named")],
        (true, count) => vec![Finding::ok(Check::Secrets, format!("{count} files can be read, secrets by taod alone"))],
    }
}

/// Looks whether versions can be signed, and would count here once they are.
pub(super) fn signing(config: &Config) -> Option<Finding> {
    let settings = &config.registry;
    if settings.signing_key_file.as_os_str().is_empty() {
        let nobody = !settings.trusted_keys.is_empty();
        return nobody.then(|| {
            let says =
                "registry.trusted_keys asks for signatures, and registry.signing_key_file names no key to make them";
            let remedy = "name the key, or nothing that is trained or imported here can be served";
            Finding::warning(Check::Secrets, says, remedy)
        });
    }
    let key = match SigningKey::read(&settings.signing_key_file) {
        Ok(key) => key.public().to_string(),
        Err(error) => {
            let remedy = "without it no version can be registered: put the key there, for this user alone";
            return Some(Finding::failure(Check::Secrets, error.to_string(), remedy));
        }
    };
    if settings.trusted_keys.is_empty() || settings.trusted_keys.contains(&key) {
        return None;
    }
    let says = format!("registry.trusted_keys does not hold {key}, by which registry.signing_key_file signs");
    Some(Finding::failure(Check::Secrets, says, "add it, or no version can be registered"))
}

/// Collects the keys that name such files: those that end in `_file`, and the table `secret_files`.
fn named_files(key: &str, value: &Value, found: &mut Vec<(String, PathBuf)>) {
    let last = key.rsplit('.').next().unwrap_or_default();
    match value {
        Value::Object(map) => {
            let inner = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
            map.iter().for_each(|(name, value)| named_files(&inner(name), value, found));
        }
        Value::Array(items) => items.iter().for_each(|item| named_files(key, item, found)),
        Value::String(path) if !path.is_empty() && (last.ends_with("_file") || key.contains("secret_files.")) => {
            found.push((key.to_owned(), path.into()));
        }
        _ => {}
    }
}

fn secret(key: &str, path: &Path) -> Option<Finding> {
    let shown = path.display();
    let is_public = ["certificate_file", "ca_file"].iter().any(|end| key.ends_with(end));
    if let Err(error) = fs::File::open(path) {
        if error.kind() == ErrorKind::NotFound && key == "admin.token_file" {
            let says = format!("{key}: {shown} is not there, so nobody has a token");
            return Some(Finding::warning(
                Check::Secrets,
                says,
                "make the first one by `taod admin token NAME --role read`",
            ));
        }
        let remedy = format!("write the secret into {shown}, readable by user {} alone", user());
        return Some(Finding::failure(Check::Secrets, format!("{key}: cannot read {shown}: {error}"), remedy));
    }
    let mode = fs::metadata(path).map(|found| found.permissions().mode()).unwrap_or_default();
    if mode & 0o007 == 0 || is_public {
        return None;
    }
    let says = format!("{key}: every user can read {shown} (mode {:o})", mode & 0o777);
    Some(Finding::warning(
        Check::Secrets,
        says,
        format!("chmod o-rwx {shown}, and change the secret if strangers use this machine"),
    ))
}

#[expect(unsafe_code, reason = "the standard library has no call for the user's number")]
pub(super) fn user() -> u32 {
    // SAFETY: the call takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}
