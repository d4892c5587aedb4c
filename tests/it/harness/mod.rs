//! What the cases share: files of the repository, golden files, the program itself, parts that a machine may lack.

pub(crate) mod kafka;
pub(crate) mod night;
pub(crate) mod site;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Returns the folder of the repository.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the text of a file of the repository.
pub(crate) fn text(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("cannot read {path}: {e}"))
}

/// Returns every file below a folder of the repository that has this extension, by its path in the repository.
pub(crate) fn files(folder: &str, extension: &str) -> Vec<String> {
    fn walk(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            match path.is_dir() {
                true => walk(&path, extension, found),
                false if path.extension().is_some_and(|e| e == extension) => found.push(path),
                false => {}
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), extension, &mut found);
    found.sort();
    found.iter().map(|path| path.strip_prefix(root()).unwrap().display().to_string()).collect()
}

/// Compares `actual` with a committed file; with TAOD_UPDATE_GOLDEN=1 it writes the file instead.
pub(crate) fn assert_golden(path: &str, actual: &str) {
    let full = root().join(path);
    if std::env::var_os("TAOD_UPDATE_GOLDEN").is_some() {
        return std::fs::write(&full, actual).unwrap();
    }
    let expected = std::fs::read_to_string(&full).unwrap_or_default();
    if expected == actual {
        return;
    }
    let differs = |(a, b): &(&str, &str)| a != b;
    let lines = expected.lines().chain([""]).zip(actual.lines().chain([""]));
    let line = lines.clone().position(|pair| differs(&pair)).unwrap_or(0);
    let (was, is) = lines.clone().nth(line).unwrap_or_default();
    panic!(
        "{path} is not what the code makes; first at line {}:\n  file: {was}\n  code: {is}\n\
         if the change is meant, write it with: TAOD_UPDATE_GOLDEN=1 cargo test --release --test it",
        line + 1
    );
}

/// How one run of the program ended.
pub(crate) struct Outcome {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Outcome {
    /// Checks the exit code, shows all output where it is another, and hands the outcome on.
    pub(crate) fn code(self, expected: i32) -> Self {
        assert_eq!(self.code, expected, "standard output:\n{}\nstandard error:\n{}", self.out, self.err);
        self
    }

    /// Checks that the command failed: code 1, nothing on standard output, one line of error that holds all of `parts`.
    pub(crate) fn refused(self, parts: &[&str]) {
        let outcome = self.code(1);
        let lines: Vec<&str> = outcome.err.lines().filter(|line| line.starts_with("taod: ")).collect();
        assert_eq!(lines.len(), 1, "{}", outcome.err);
        assert!(parts.iter().all(|part| lines[0].contains(part)), "{parts:?} in {}", lines[0]);
        assert_eq!(outcome.out, "");
    }
}

/// Runs the program in an empty folder with no environment of ours; see [`taod_in`].
pub(crate) fn taod(arguments: &[&str]) -> Outcome {
    taod_in(tempfile::tempdir().unwrap().path(), arguments, &[])
}

/// Runs the program in `folder` with these environment variables, and nothing on standard input.
pub(crate) fn taod_in(folder: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Outcome {
    let inherited = std::env::vars_os().filter(|(name, _)| !name.to_string_lossy().starts_with("TAOD_"));
    let output = Command::new(env!("CARGO_BIN_EXE_taod"))
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .envs(inherited)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Outcome {
        // A signal has no exit code; no test expects -1.
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Returns true where an optional part of this machine is there. Where it is not, the caller returns at once and the
/// test says that it was skipped; but where TAOD_REQUIRE names the part (CI), its absence fails the test.
pub(crate) fn has(part: &str, there: bool, remedy: &str) -> bool {
    let required = std::env::var("TAOD_REQUIRE").unwrap_or_default();
    let demanded = required.split(',').any(|name| name.trim() == part);
    assert!(there || !demanded, "TAOD_REQUIRE demands {part}, and it is not here; {remedy}");
    if !there {
        eprintln!("SKIPPED: {part} is not here; {remedy}");
    }
    there
}

/// Returns the folder that `make` caches things in.
pub(crate) fn cache() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()).map_or_else(home, PathBuf::from).join("taod")
}

/// Returns the folder of the demo's model, scorer and prompts, where they were fetched.
pub(crate) fn models() -> Option<PathBuf> {
    let folder = cache().join("models");
    has("models", folder.join("SmolLM2-135M-Instruct.Q4_1.gguf").is_file(), "run `make models`").then_some(folder)
}

/// Returns the Python that has the independent readers of Delta tables.
pub(crate) fn readers() -> Option<PathBuf> {
    let python = cache().join("readers/bin/python");
    has("readers", python.is_file(), "run `tools/setup.sh test`").then_some(python)
}

/// Returns the Python that has Apache Spark, and the folder of Delta's jars.
pub(crate) fn spark() -> Option<(PathBuf, PathBuf)> {
    let (python, jars) = (cache().join("spark/bin/python"), cache().join("spark/delta"));
    let there = python.is_file() && jars.join("pom.xml").is_file();
    has("spark", there, "run `tools/setup.sh full`").then_some((python, jars))
}
