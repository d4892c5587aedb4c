//! Secrets: read from a file or the environment at the moment of use, never part of the config, never printed.
//!
//! A stage that needs one declares only `<key>_file` among its settings. The value then comes from the environment
//! variable of the key without `_file` (`kafka.sasl_password_file` -> `TAOD__KAFKA__SASL_PASSWORD`), else from the file.
//! Since no config struct ever holds the value, no dump of a config can show it.

use std::fmt;
use std::path::Path;

/// A value that must not be seen. It has no useful `Debug` or `Display` and no `Serialize`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides `value`.
    pub fn new(value: impl Into<String>) -> Self {
        Secret(value.into())
    }

    /// Returns the value itself; the name makes each use easy to find.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A secret that could not be read. The message names the key and the file, never a value.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("{key}_file: cannot read {path}: {source}")]
    Read { key: String, path: String, source: std::io::Error },
    #[error("{key}_file: {path} is empty; write the secret into it, or unset the key")]
    Empty { key: String, path: String },
}

/// Returns the name of the environment variable that holds the secret of `key` (`kafka.sasl_password`).
pub fn variable(key: &str) -> String {
    format!("TAOD__{}", key.replace('.', "__").to_uppercase())
}

/// Reads the secret of `key` from the environment, else from `file`; `None` where neither is given (an empty path is not).
pub fn read(key: &str, file: Option<&Path>) -> Result<Option<Secret>, SecretError> {
    read_from(key, std::env::var(variable(key)).ok(), file)
}

fn read_from(key: &str, from_environment: Option<String>, file: Option<&Path>) -> Result<Option<Secret>, SecretError> {
    if let Some(value) = from_environment.filter(|value| !value.is_empty()) {
        return Ok(Some(Secret(value)));
    }
    let Some(path) = file.filter(|path| !path.as_os_str().is_empty()) else { return Ok(None) };
    let shown = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|source| SecretError::Read {
        key: key.to_string(),
        path: shown.clone(),
        source,
    })?;
    // Editors and `echo` end a file with a line break that is no part of the secret.
    let value = text.trim_end_matches(['\n', '\r']);
    if value.is_empty() {
        return Err(SecretError::Empty { key: key.to_string(), path: shown });
    }
    Ok(Some(Secret::new(value)))
}

/// Keeps what this process makes to its own user: new files are for their owner alone, and no memory goes into a core dump,
/// which would hold queries, answers and keys. Called first of all.
#[cfg(unix)]
#[expect(unsafe_code, reason = "the standard library has no call for either")]
pub fn keep_private() {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the mask is a plain number, and the pointer is to a live, initialised struct that the call only reads. Where the
    // limit cannot be set, the system's own holds; there is nothing better to do.
    unsafe {
        libc::umask(0o077);
        libc::setrlimit(libc::RLIMIT_CORE, &none);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_printed() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret} {secret:?} {:?}", Some(&secret)), "*** *** Some(***)");
        assert_eq!(secret.expose(), "hunter2");
    }

    #[test]
    fn the_environment_wins_over_the_file_and_the_line_end_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        std::fs::write(&path, "from file \n").unwrap();
        let read = |env: Option<&str>| read_from("kafka.sasl_password", env.map(String::from), Some(&path)).unwrap();
        assert_eq!(read(Some("from env")), Some(Secret::new("from env")));
        assert_eq!(read(None), Some(Secret::new("from file ")));
        assert_eq!(read_from("kafka.sasl_password", None, None).unwrap(), None);
        assert_eq!(read_from("kafka.sasl_password", None, Some(Path::new(""))).unwrap(), None);
        assert_eq!(variable("kafka.sasl_password"), "TAOD__KAFKA__SASL_PASSWORD");
    }

    #[test]
    fn a_missing_or_empty_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        let missing = read_from("a.b", None, Some(&path)).unwrap_err().to_string();
        assert!(missing.starts_with("a.b_file: cannot read ") && missing.contains("password"), "{missing}");
        std::fs::write(&path, "\n").unwrap();
        let empty = read_from("a.b", None, Some(&path)).unwrap_err().to_string();
        assert!(empty.contains("is empty"), "{empty}");
    }
}
