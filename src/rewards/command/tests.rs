//! Programs in shell that score well and badly.

use super::*;

fn items(n: usize) -> Vec<Item> {
    let answers: Vec<String> = (0..n).map(|i| "x".repeat(i)).collect();
    crate::rewards::testing::items(&answers.iter().map(|answer| ("q", answer.as_str())).collect::<Vec<_>>())
}

fn shell(script: &str, more: &str) -> Settings {
    let script = serde_json::to_string(script).unwrap();
    toml::from_str(&format!("command = ['/bin/sh', '-c', {script}]\n{more}")).unwrap()
}

fn run(settings: &Settings, n: usize) -> Result<Vec<f64>, String> {
    let items = items(n);
    Command::open(settings).unwrap().score(&items.iter().collect::<Vec<_>>()).map_err(|error| {
        let message = error.to_string();
        // What the program said, which the message must not repeat.
        let said = match error {
            CommandError::Count { said, .. } => said,
            CommandError::Line { found, .. } => found,
            _ => return message,
        };
        assert!(said.is_empty() || !message.contains(&said), "{message}");
        format!("{message} | {said}")
    })
}

/// Answers each line by its index over 100.
const HUNDREDTHS: &str =
    r#"while read -r line; do i=${line#*\"index\":}; i=${i%%,*}; printf '{"score": %d.%02d}\n' 0 "$i"; done"#;

#[test]
fn a_program_answers_line_by_line_and_batch_by_batch() {
    assert_eq!(run(&shell(HUNDREDTHS, ""), 3), Ok(vec![0.0, 0.01, 0.02]));
    assert_eq!(run(&shell(HUNDREDTHS, "batch = 2"), 3), Ok(vec![0.0, 0.01, 0.0]));
    assert_eq!(run(&shell(HUNDREDTHS, ""), 0), Ok(vec![]));
    // More than a pipe holds, read before a word is said.
    let late = format!("lines=$(cat); printf '%s\\n' \"$lines\" | {{ {HUNDREDTHS}; }}");
    assert_eq!(run(&shell(&late, ""), 90).map(|scores| scores.len()), Ok(90));
}

#[test]
fn what_is_no_score_is_refused_with_its_line() {
    for (answer, part) in [
        ("{\"score\": 1.5}", "with a number in [0, 1]; `--log debug` shows it | {\"score\": 1.5}"),
        ("{\"score\": NaN}", " | {\"score\": NaN}"),
        ("<html>", "answered line 0 with something else than {\"score\": number}"),
        ("{}", " | {}"),
    ] {
        let message = run(&shell(&format!("cat > /dev/null; echo '{answer}'"), ""), 1).unwrap_err();
        assert!(message.contains(part), "{message}");
    }
    let fewer =
        run(&shell("cat > /dev/null; echo '{\"score\": 1}'; echo 'out of paper' >&2; exit 3", ""), 2).unwrap_err();
    assert!(fewer.contains("gave 1 scores for 2 answers and ended with exit status: 3; "), "{fewer}");
    assert!(fewer.ends_with(" | out of paper"), "{fewer}");
    let more = run(&shell("cat > /dev/null; echo '{\"score\": 1}'; echo '{\"score\": 1}'", ""), 1).unwrap_err();
    assert!(more.contains("gave 2 scores for 1 answers"), "{more}");
    let long = run(&shell("head -c 70000 /dev/zero | tr '\\0' x", ""), 1).unwrap_err();
    assert!(long.contains("more than 65536 bytes without a line break"), "{long}");
}

#[test]
fn a_program_that_is_too_slow_is_killed_with_all_it_started() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    assert!(Process::new("mkfifo").arg(&pipe).status().unwrap().success());
    // What the program started holds the pipe open as long as it lives.
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::read(pipe).unwrap()
    });
    let began = Instant::now();
    let message =
        run(&shell(&format!("exec 9> {}; sleep 300 & wait", pipe.display()), "timeout_s = 1"), 1).unwrap_err();
    assert!(message.contains("did not answer within 1 s and was killed"), "{message}");
    reader.join().unwrap();
    assert!(began.elapsed() < Duration::from_secs(200), "it outlived the scoring");
}

#[test]
fn what_a_program_leaves_behind_does_not_hold_a_scoring_up() {
    let began = Instant::now();
    assert_eq!(run(&shell(&format!("sleep 1000 & {HUNDREDTHS}; exit 0"), ""), 1), Ok(vec![0.0]));
    assert!(began.elapsed() < Duration::from_secs(60));
}

#[test]
fn limits_and_surroundings_are_those_of_the_settings() {
    let said =
        |script: &str, more: &str| run(&shell(&format!("cat > /dev/null; {script} >&2; exit 1"), more), 1).unwrap_err();
    let limits = said(
        "echo $(ulimit -t) $(ulimit -v) $(ulimit -n) $(ulimit -f) $(ulimit -c)",
        "cpu_s = 7\nmemory_mib = 64\nopen_files = 33\nfile_mib = 1",
    );
    // The shell counts file sizes in blocks of 512 bytes.
    assert!(limits.ends_with("7 65536 33 2048 0"), "{limits}");
    assert!(said("echo home is $(pwd) and $HOME $(ls -A | wc -l)", "").contains(" 0"), "the folder is empty");
    assert!(!said("env", "").contains("CARGO"), "the environment is not ours");
}

#[test]
fn files_that_the_command_names_decide_the_identity() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("score.sh");
    let settings: Settings = toml::from_str(&format!("command = ['/bin/sh', '{}']", script.display())).unwrap();
    std::fs::write(&script, HUNDREDTHS).unwrap();
    let before = Command::open(&settings).unwrap().identity();
    std::fs::write(&script, format!("{HUNDREDTHS}\n")).unwrap();
    assert_ne!(Command::open(&settings).unwrap().identity(), before);
    let refusal = |toml: &str| toml::from_str::<Settings>(toml).unwrap().validate().unwrap_err();
    assert!(refusal("command = []").starts_with("command = []"));
    assert!(refusal("command = ['python']").contains("absolute path"));
    assert!(refusal("command = ['/bin/sh']\ntimeout_s = 0").starts_with("timeout_s = 0"));
    let absent: Settings = toml::from_str("command = ['/no/such/program']").unwrap();
    assert!(Command::open(&absent).map(|_| ()).unwrap_err().to_string().contains("/no/such/program"));
}
