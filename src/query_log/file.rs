//! A file of JSON lines as a log, to see how its records would be read (`taod records`).

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use super::SourceError;

/// Yields the lines of `path` with their index, counted from 0; empty lines are passed over but counted.
///
/// Lines are bytes: what is not UTF-8 is for the format to refuse, not for the file to lose.
pub fn lines(path: &Path) -> Result<impl Iterator<Item = Result<(u64, Vec<u8>), SourceError>>, SourceError> {
    let name = path.display().to_string();
    let fail = move |action, e: std::io::Error| SourceError::File { action, path: name.clone(), why: e.to_string() };
    let file = File::open(path).map_err(|e| fail("cannot open", e))?;
    let lines = BufReader::new(file).split(b'\n').enumerate().map(move |(index, line)| match line {
        Ok(line) => Ok((index as u64, line)),
        Err(error) => Err(fail("cannot read", error)),
    });
    Ok(lines.filter(|line| !matches!(line, Ok((_, bytes)) if bytes.trim_ascii().is_empty())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_keep_their_index_and_their_bytes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"{\"a\":1}\n\n\xff\xfe\nlast").unwrap();
        let found: Vec<_> = lines(file.path()).unwrap().map(Result::unwrap).collect();
        assert_eq!(found, [(0, b"{\"a\":1}".to_vec()), (2, b"\xff\xfe".to_vec()), (3, b"last".to_vec())]);
        let error = lines(Path::new("/no/such/file")).err().unwrap().to_string();
        assert!(error.starts_with("cannot open /no/such/file"), "{error}");
    }
}
