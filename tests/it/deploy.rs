//! What stands in docs/deploy can be used: it parses, its config is taken, its parts fit each other. And a packed release is a
//! function of the program and the tree.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::{Map, Value, json};
use taod::config::{Config, Loaded};
use yaml_rust2::{Yaml, YamlLoader};

use crate::harness::{has, root, text};

fn to_json(yaml: &Yaml) -> Value {
    match yaml {
        Yaml::Hash(map) => {
            let pair =
                |(key, value): (&Yaml, &Yaml)| (key.as_str().expect("keys are texts").to_string(), to_json(value));
            Value::Object(map.iter().map(pair).collect::<Map<_, _>>())
        }
        Yaml::Array(items) => items.iter().map(to_json).collect(),
        Yaml::String(text) => text.as_str().into(),
        Yaml::Integer(number) => (*number).into(),
        Yaml::Boolean(value) => (*value).into(),
        Yaml::Real(_) => yaml.as_f64().into(),
        Yaml::Null | Yaml::Alias(_) | Yaml::BadValue => Value::Null,
    }
}

/// Returns the objects of a file.
fn objects(path: &str) -> Vec<Value> {
    let parsed = YamlLoader::load_from_str(&text(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    parsed.iter().map(to_json).collect()
}

fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    objects
        .iter()
        .find(|o| o["kind"] == kind && o["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("no {kind} {name}"))
}

fn list<'a>(value: &'a Value, key: &str) -> Vec<&'a Value> {
    value[key].as_array().unwrap_or_else(|| panic!("{key} is no list in {value}")).iter().collect()
}

/// Returns the container of this name.
fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    list(pod, "containers").into_iter().find(|c| c["name"] == name).unwrap()
}

fn mounts(container: &Value) -> BTreeSet<(String, String)> {
    let pair = |m: &Value| (m["name"].as_str().unwrap().to_string(), m["mountPath"].as_str().unwrap().to_string());
    list(container, "volumeMounts").into_iter().map(pair).collect()
}

fn config_of(objects: &[Value]) -> Config {
    let toml = find(objects, "ConfigMap", "taod")["data"]["taod.toml"].as_str().unwrap().to_string();
    Loaded::from_layers(Some(("taod.toml".into(), toml)), vec![]).unwrap_or_else(|e| panic!("{e}")).config
}

#[test]
fn the_config_in_kubernetes_is_taken_and_its_paths_are_mounted() {
    let objects = objects("docs/deploy/kubernetes.yaml");
    let config = config_of(&objects);
    let pod = &find(&objects, "StatefulSet", "llm")["spec"]["template"]["spec"];
    let (taod, vllm) = (container(pod, "taod"), container(pod, "vllm"));
    let under = |container: &Value, path: &Path| mounts(container).iter().any(|(_, at)| path.starts_with(at));
    assert!(under(taod, &config.state.dir) && under(vllm, &config.state.dir), "adapters have one path for both");
    assert!(under(taod, Path::new(&config.model.path)) && under(vllm, Path::new(&config.model.path)));
    assert!(under(taod, &config.rewards.similarity.model));
    // Each secret that the config names is a key of the secret that is mounted there.
    let secret = &find(&objects, "Secret", "taod")["stringData"];
    let toml = find(&objects, "ConfigMap", "taod")["data"]["taod.toml"].as_str().unwrap();
    let credentials = mounts(taod).into_iter().find(|(name, _)| name == "credentials").unwrap().1;
    let named: Vec<&str> = toml.split('"').filter(|word| word.starts_with(&credentials)).collect();
    assert_eq!(named.len(), 2, "{named:?}");
    for path in named {
        assert!(secret[Path::new(path).file_name().unwrap().to_str().unwrap()].is_string(), "{path} is in no secret");
    }
    // A folder cannot be made inside of a config map or a secret, which are read-only.
    let paths: Vec<String> = mounts(taod).into_iter().map(|(_, at)| at).collect();
    let inside = |at: &String| paths.iter().any(|other| other != at && Path::new(at).starts_with(other));
    assert!(!paths.iter().any(inside), "{paths:?}");
    let probes = config.admin.probe_listen.rsplit(':').next().unwrap().to_string();
    assert_eq!(list(taod, "ports")[0]["containerPort"].to_string(), probes);
    let port = config.endpoint.urls[0].rsplit(':').next().unwrap();
    assert_eq!(list(vllm, "ports")[0]["containerPort"].to_string(), port);
}

#[test]
fn the_parts_in_kubernetes_fit_each_other_and_what_taod_needs_of_vllm() {
    let objects = objects("docs/deploy/kubernetes.yaml");
    let config = config_of(&objects);
    let set = &find(&objects, "StatefulSet", "llm")["spec"];
    assert_eq!(set["replicas"], 1, "a daemon owns one endpoint");
    assert_eq!(set["selector"]["matchLabels"], set["template"]["metadata"]["labels"]);
    assert_eq!(find(&objects, "Service", "llm")["spec"]["selector"], set["template"]["metadata"]["labels"]);
    let pod = &set["template"]["spec"];
    let volumes: BTreeSet<&str> = list(pod, "volumes").iter().map(|v| v["name"].as_str().unwrap()).collect();
    let mut mounted = BTreeSet::new();
    for container in list(pod, "containers") {
        let ports: BTreeSet<&str> = list(container, "ports").iter().map(|p| p["name"].as_str().unwrap()).collect();
        for probe in ["livenessProbe", "readinessProbe"].iter().filter(|probe| container.get(**probe).is_some()) {
            assert!(ports.contains(container[*probe]["httpGet"]["port"].as_str().unwrap()), "{container}");
        }
        assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
        mounted.extend(mounts(container).into_iter().map(|(name, _)| name));
    }
    assert_eq!(volumes.into_iter().map(str::to_string).collect::<BTreeSet<_>>(), mounted);
    for volume in list(pod, "volumes") {
        let (kind, name) = if let Some(claim) = volume["persistentVolumeClaim"]["claimName"].as_str() {
            ("PersistentVolumeClaim", claim)
        } else if let Some(map) = volume["configMap"]["name"].as_str() {
            ("ConfigMap", map)
        } else if let Some(secret) = volume["secret"]["secretName"].as_str() {
            ("Secret", secret)
        } else {
            continue;
        };
        find(&objects, kind, name);
    }
    // vLLM reads adapters by the group, and cannot write them.
    let group = &container(pod, "taod")["securityContext"]["runAsGroup"];
    assert_eq!(
        (&pod["securityContext"]["fsGroup"], &pod["securityContext"]["supplementalGroups"]),
        (group, &json!([group]))
    );
    let vllm = container(pod, "vllm");
    let state = list(vllm, "volumeMounts").into_iter().find(|m| m["name"] == "state").unwrap();
    assert_eq!(state["readOnly"], true);
    let argument = |name: &str| -> u64 {
        let arguments = list(vllm, "args");
        let found = arguments.iter().find_map(|a| a.as_str()?.strip_prefix(name)?.strip_prefix('='));
        found.unwrap_or_else(|| panic!("{name} is missing")).parse().unwrap()
    };
    assert!(argument("--max-loras") >= 2);
    assert!(argument("--max-lora-rank") >= config.tuning.rank as u64);
    assert!(list(vllm, "env").iter().any(|e| e["name"] == "VLLM_ALLOW_RUNTIME_LORA_UPDATING" && e["value"] == "1"));
    let served = format!("--served-model-name={}", config.endpoint.base_model);
    assert!(list(vllm, "args").iter().any(|a| **a == json!(served)));
    // The image of the Dockerfile has the same numbers.
    assert!(text("docs/deploy/Dockerfile").contains(&format!("--gid {group} taod-adapters")));
}

#[test]
fn the_way_to_metrics_is_one_that_taod_takes() {
    let objects = objects("docs/deploy/metrics.yaml");
    let head = text("docs/deploy/metrics.yaml");
    let lines: Vec<&str> = head.lines().filter_map(|line| line.strip_prefix("#   ")).collect();
    let toml = format!("[admin]\n{}\n", lines.join("\n"));
    let config =
        Loaded::<Config>::from_layers(Some(("taod.toml".into(), toml)), vec![]).unwrap_or_else(|e| panic!("{e}"));
    let service = find(&objects, "Service", "taod-metrics");
    let monitor = &find(&objects, "ServiceMonitor", "taod")["spec"];
    assert_eq!(monitor["selector"]["matchLabels"], service["metadata"]["labels"]);
    let (port, endpoint) = (list(&service["spec"], "ports")[0], list(monitor, "endpoints")[0]);
    assert_eq!(port["name"], endpoint["port"]);
    assert_eq!(config.config.admin.listen, format!("0.0.0.0:{}", port["targetPort"]));
    assert!(config.config.admin.hosts.contains(&endpoint["tlsConfig"]["serverName"].as_str().unwrap().to_string()));
    let secret = find(&objects, "Secret", "taod-metrics");
    for key in [&endpoint["authorization"]["credentials"]["key"], &endpoint["tlsConfig"]["ca"]["secret"]["key"]] {
        assert!(secret["stringData"][key.as_str().unwrap()].is_string(), "{key}");
    }
}

/// Packs a release and returns its checksums.
fn pack(out: &Path, folder: &Path, environment: &[(&str, &str)]) -> String {
    // A mask of the caller's must not show.
    let script = format!("umask {}; exec \"$0\" --binary \"$1\" --out \"$2\"", environment[0].1);
    let output = Command::new("sh")
        .args(["-c", &script])
        .arg(root().join("tools/package/dist"))
        .arg(env!("CARGO_BIN_EXE_taod"))
        .arg(out)
        .current_dir(folder)
        .envs(environment[1..].iter().copied())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read_to_string(out.join("SHA256SUMS")).unwrap()
}

#[test]
#[ignore = "packs the whole program twice"]
fn a_release_is_the_same_bytes_whoever_packs_it_when_and_where() {
    let there = Command::new("strip").arg("--version").output().is_ok() && root().join(".git").exists();
    if !has("strip", there, "install Debian's packages binutils and git") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    let first = pack(&a, folder.path(), &[("umask", "022"), ("TZ", "UTC")]);
    let second = pack(&b, &root(), &[("umask", "077"), ("TZ", "Asia/Tokyo"), ("LC_ALL", "C"), ("HOME_OF_OTHERS", "x")]);
    assert_eq!(first, second);
    let later = folder.path().join("c");
    let third = pack(&later, folder.path(), &[("umask", "022"), ("SOURCE_DATE_EPOCH", "1")]);
    assert_ne!(first, third, "the time is that of the tree, or the one that is given");
    let checked =
        Command::new("sha256sum").args(["--check", "--strict", "SHA256SUMS"]).current_dir(&a).status().unwrap();
    assert!(checked.success());
    // The document of what it is made of names all that the lock file has for this target, with its hash.
    let name =
        first.lines().find_map(|line| line.split("  ").nth(1).filter(|name| name.ends_with(".cdx.json"))).unwrap();
    let bom: Value = serde_json::from_slice(&std::fs::read(a.join(name)).unwrap()).unwrap();
    assert_eq!((&bom["bomFormat"], &bom["specVersion"]), (&json!("CycloneDX"), &json!("1.5")));
    let lock: toml::Table = text("Cargo.lock").parse().unwrap();
    let locked: BTreeSet<(String, String, String)> = lock["package"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|p| {
            Some((p["name"].as_str()?.into(), p["version"].as_str()?.into(), p.get("checksum")?.as_str()?.into()))
        })
        .collect();
    let components = list(&bom, "components");
    assert!(components.len() > 300, "{}", components.len());
    for component in &components {
        let field = |key: &str| component[key].as_str().unwrap_or_default().to_string();
        let hash = component["hashes"][0]["content"].as_str().unwrap_or_default().to_string();
        assert!(locked.contains(&(field("name"), field("version"), hash)), "{component}");
        assert!(component["licenses"].is_array(), "{component}");
    }
    for needed in ["rdkafka", "candle-core", "deltalake", "libsqlite3-sys"] {
        assert!(components.iter().any(|c| c["name"] == needed && c["scope"] == "required"), "{needed} is not listed");
    }
    let tar = Command::new("tar").args(["-tvzf"]).arg(a.join(name.replace(".cdx.json", ".tar.gz"))).output().unwrap();
    let listed = String::from_utf8(tar.stdout).unwrap();
    for file in
        ["bin/taod", "man/man1/taod.1", "completions/_taod", "systemd/taod.service", "docs/deploy/kubernetes.yaml"]
    {
        assert!(listed.contains(&format!("/{file}\n")), "{file} is not in {listed}");
    }
    assert!(listed.lines().all(|line| line.contains(" 0/0 ")), "owners are numbers, and none of ours: {listed}");
}
