//! Where a server finds a folder that taod knows by another path: a mount in its container, or shared storage.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Beginnings of paths and what stands for them at the server.
#[derive(Debug, Clone, Default)]
pub(super) struct PathMap(Vec<(PathBuf, PathBuf)>);

impl PathMap {
    pub(super) fn new(map: &BTreeMap<String, String>) -> Self {
        let mut pairs: Vec<_> = map.iter().map(|(ours, theirs)| (PathBuf::from(ours), PathBuf::from(theirs))).collect();
        // The longest beginning wins, whatever the order of the config.
        pairs.sort_by_key(|(ours, _)| std::cmp::Reverse(ours.components().count()));
        PathMap(pairs)
    }

    /// Returns the path by which the server sees `path`. Whole components are compared: `/a/b` does not begin `/a/bc`.
    pub(super) fn seen(&self, path: &Path) -> String {
        let mapped = self.0.iter().find_map(|(ours, theirs)| Some(theirs.join(path.strip_prefix(ours).ok()?)));
        mapped.as_deref().unwrap_or(path).display().to_string()
    }

    /// Checks a map as an operator wrote it.
    pub(super) fn validate(map: &BTreeMap<String, String>) -> Result<(), String> {
        match map.iter().find(|(ours, theirs)| !Path::new(ours).is_absolute() || !Path::new(theirs).is_absolute()) {
            Some((ours, theirs)) => Err(format!("path_map.{ours:?} = {theirs:?}: both must be absolute paths")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_beginning_of_whole_components_is_replaced() {
        let map = [("/var/lib", "/mnt"), ("/var/lib/taod", "/adapters"), ("/x", "/y")];
        let map = map.map(|(a, b)| (a.to_owned(), b.to_owned())).into();
        assert_eq!(PathMap::validate(&map), Ok(()));
        let seen = |path: &str| PathMap::new(&map).seen(Path::new(path));
        assert_eq!(seen("/var/lib/taod/registry/v1"), "/adapters/registry/v1");
        assert_eq!(seen("/var/lib/taodx/v1"), "/mnt/taodx/v1");
        assert_eq!(seen("/srv/v1"), "/srv/v1");
        assert_eq!(PathMap::default().seen(Path::new("/a")), "/a");
        assert!(PathMap::validate(&[("a".to_owned(), "/b".to_owned())].into()).is_err());
    }
}
