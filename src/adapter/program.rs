//! The program of a trainer and all that it starts, which end with this process.
//!
//! A trainer starts processes of its own, and a round may die at any moment, killed or out of memory; what then went on
//! would take the machine from the next try and write into its folder. A parent-death signal would reach the program
//! alone. So the program runs in the process group of a guard, a shell that reads a pipe from here: when the pipe closes, because this
//! process is gone, however it went, the guard asks the whole group to end and then ends it. What a program that ended
//! by itself left running is ended at once.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

/// The guard: a word says that the program has ended; the end of the input, that taod has. `$$` is its group, which
/// nobody else can get while it lives.
const GUARD: &str = "trap '' TERM INT HUP
read -r word
if [ \"$word\" != done ]; then kill -s TERM -- -$$; sleep 10; fi
kill -s KILL -- -$$";

/// Runs the program to its end, its output on standard error, since standard output may be a document of ours. Its standard
/// input stays open as long as this process lives.
pub(super) fn run(command: &mut Command) -> io::Result<ExitStatus> {
    let guard = Guard::start()?;
    let mut child = command.process_group(guard.group()?).stdin(Stdio::piped()).stdout(io::stderr()).spawn()?;
    // Taken out and held: `wait` would close it at once.
    let lifeline = child.stdin.take();
    let status = child.wait();
    drop((lifeline, guard));
    status
}

/// The shell that ends the group; dropping it ends the group now.
struct Guard(Child);

impl Guard {
    fn start() -> io::Result<Self> {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", GUARD]).process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Guard(shell.spawn()?))
    }

    fn group(&self) -> io::Result<i32> {
        i32::try_from(self.0.id()).map_err(io::Error::other)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let told = self.0.stdin.take().is_some_and(|mut pipe| pipe.write_all(b"done\n").is_ok());
        if !told {
            tracing::warn!("the guard of tuning.command is gone; processes of the trainer may go on");
        }
        if let Err(error) = self.0.wait() {
            tracing::warn!(%error, "the guard of tuning.command cannot be waited for");
        }
    }
}
