use super::*;

const IMAGES: &str = "additionalimagestores = [\"/var/lib/nydus-store/store\"]";
const LAYERS: &str = "additionallayerstores = [\"/var/lib/nydus-store/layers:ref\"]";
/// The block that the earlier version appended to a file without `[storage.options]`.
const EARLIER: &str = "\n# Added by nydus-store setup.\n[storage.options]\n\
                       additionallayerstores = [\"/var/lib/nydus-store/store:ref\"]\n";

fn stores() -> Stores {
    Stores {
        images: "/var/lib/nydus-store/store".to_owned(),
        layers: "/var/lib/nydus-store/layers".to_owned(),
    }
}

fn file(text: &str) -> StorageConf<'_> {
    StorageConf {
        path: Path::new("storage.conf"),
        text,
    }
}

fn list(text: &str, name: &str) -> Vec<String> {
    let read: toml::Table = text.parse().unwrap();
    let values = read["storage"]["options"][name].as_array().unwrap().iter();
    values.filter_map(|value| value.as_str().map(str::to_owned)).collect()
}

/// Adds the stores. Asserts that adding is idempotent and that removing restores the text.
fn round_trip(text: &str) -> String {
    let with = file(text).with_stores(&stores()).unwrap();
    let named = file(&with).named_stores(&stores()).unwrap();
    assert!(
        named.images && named.layers && !named.layers_not_first && !named.legacy,
        "{with}"
    );
    assert_eq!(file(&with).with_stores(&stores()).unwrap(), with);
    assert_eq!(file(&with).without_stores(&stores()).unwrap(), text, "{with}");
    let count = |name, value: &str| list(&with, name).iter().filter(|known| *known == value).count();
    assert_eq!(count(IMAGE_STORES, "/var/lib/nydus-store/store"), 1);
    assert_eq!(count(LAYER_STORES, "/var/lib/nydus-store/layers:ref"), 1);
    assert_eq!(list(&with, LAYER_STORES)[0], "/var/lib/nydus-store/layers:ref");
    with
}

#[test]
fn other_settings_are_preserved() {
    let both = format!("[storage.options]\n{IMAGES}\n{LAYERS}\n");
    for (text, line) in [
        ("", both.as_str()),
        (SKELETON, &both),
        ("# all by default\n", "[storage]\ndriver = \"overlay\"\nrunroot = "),
        (
            "[storage]\n# mine\ndriver = \"overlay\"   # really\n\n[storage.options]\n# none yet\nsize = \"\"\n\n# tuned\n\
             [storage.options.overlay]\nmountopt = \"nodev\"\n",
            "size = \"\"\n# Added by nydus-store setup.\nadditionalimagestores = [\"/var/lib/nydus-store/store\"]\n\
             # Added by nydus-store setup.\nadditionallayerstores = [\"/var/lib/nydus-store/layers:ref\"]\n\n# tuned",
        ),
        (
            "[storage]\n[storage.options]\n# nothing here\n\n[storage.options.overlay]\n",
            "[storage.options]\n# Added by",
        ),
        ("[storage]\noptions = { size = \"1\" }\n", IMAGES),
        ("storage.driver = \"overlay\"\n", "[storage.options]"),
        ("storage.options.size = \"1\"\n", LAYERS),
        (
            "[storage]\n[storage.options.overlay]\nmountopt = \"nodev\"\n",
            "\"nodev\"\n\n# Added by nydus-store setup.\n[storage.options]\n",
        ),
        (
            "[storage.options.overlay]\nmountopt = \"nodev\"\n",
            "\"nodev\"\n\n# Added by nydus-store setup.\n[storage]\ndriver",
        ),
    ] {
        let with = round_trip(text);
        assert!(with.contains(line), "{with}");
    }
}

#[test]
fn image_store_comes_after_others() {
    for (theirs, expected) in [
        ("[\"/a\"] # theirs", "[\"/a\", \"/var/lib/nydus-store/store\"] # theirs"),
        ("[ \"/a\" ]", "[ \"/a\", \"/var/lib/nydus-store/store\" ]"),
        (
            "[\n  # theirs\n  \"/a\",\n]",
            "[\n  # theirs\n  \"/a\",\n  \"/var/lib/nydus-store/store\",\n]",
        ),
        ("[\n\t\"/a\"\n]", "[\n\t\"/a\",\n\t\"/var/lib/nydus-store/store\"\n]"),
        ("[]", "[\"/var/lib/nydus-store/store\"]"),
        ("[\n]", "[\"/var/lib/nydus-store/store\"\n]"),
        ("[ # none\n]", "[\"/var/lib/nydus-store/store\" # none\n]"),
        (
            "[\"/a\", {append = true}]",
            "[\"/a\", {append = true}, \"/var/lib/nydus-store/store\"]",
        ),
    ] {
        let with = round_trip(&format!("[storage.options]\nadditionalimagestores = {theirs}\n"));
        assert!(with.contains(expected), "{with}");
    }
}

#[test]
fn layer_store_comes_before_others() {
    for (theirs, expected) in [
        (
            "[\"/a:ref\"] # theirs",
            "[\"/var/lib/nydus-store/layers:ref\", \"/a:ref\"] # theirs",
        ),
        (
            "[ \"/a\", \"/b\" ]",
            "[ \"/var/lib/nydus-store/layers:ref\", \"/a\", \"/b\" ]",
        ),
        (
            "[\n  # theirs\n  \"/a:ref\",\n]",
            "[\n  \"/var/lib/nydus-store/layers:ref\",\n  # theirs\n  \"/a:ref\",\n]",
        ),
        (
            "[\n\t\"/a\"\n]",
            "[\n\t\"/var/lib/nydus-store/layers:ref\",\n\t\"/a\"\n]",
        ),
        ("[]", "[\"/var/lib/nydus-store/layers:ref\"]"),
    ] {
        let text = format!("[storage.options]\nadditionallayerstores = {theirs}\n");
        let with = round_trip(&text);
        assert!(with.contains(expected), "{with}");
        let others = file(&with).other_layer_stores(&stores()).unwrap();
        assert_eq!(others.len(), theirs.matches('/').count());
    }
    let behind = "[storage.options]\nadditionallayerstores = [\"/a\", \"/var/lib/nydus-store/layers:ref\"]\n";
    assert!(file(behind).named_stores(&stores()).unwrap().layers_not_first);
    let with = file(behind).with_stores(&stores()).unwrap();
    assert_eq!(list(&with, LAYER_STORES), ["/var/lib/nydus-store/layers:ref", "/a"]);
}

#[test]
fn entry_of_an_earlier_version_is_replaced() {
    for (before, rest) in [
        (format!("{SKELETON}{EARLIER}"), SKELETON.to_owned()),
        (format!("[storage]\ndriver = \"overlay\"\n{EARLIER}"), "[storage]\ndriver = \"overlay\"\n".to_owned()),
        (
            "[storage.options]\n# Added by nydus-store setup.\nadditionallayerstores = [\"/var/lib/nydus-store/store:ref\"]\n"
                .to_owned(),
            "[storage.options]\n".to_owned(),
        ),
        (
            "[storage.options]\nadditionallayerstores = [\"/a:ref\", \"/var/lib/nydus-store/store:ref\"]\n".to_owned(),
            "[storage.options]\nadditionallayerstores = [\"/a:ref\"]\n".to_owned(),
        ),
    ] {
        assert!(file(&before).named_stores(&stores()).unwrap().legacy);
        assert_eq!(file(&before).without_stores(&stores()).unwrap(), rest);
        let with = file(&before).with_stores(&stores()).unwrap();
        assert!(!with.contains("store:ref\"") || with.contains("layers:ref"), "{with}");
        let named = file(&with).named_stores(&stores()).unwrap();
        assert!(named.images && named.layers && !named.legacy, "{with}");
        assert_eq!(file(&with).without_stores(&stores()).unwrap(), rest);
    }
}

#[test]
fn inline_tables_stay_valid_toml_1_0() {
    for options in [
        "{ size = \"1\" }",
        "{size = \"1\"}",
        "{}",
        "{ overlay.size = \"1\" } # mine",
    ] {
        let text = format!("[storage]\noptions = {options}\n");
        let with = round_trip(&text);
        let (_, inside) = with.split_once('{').unwrap();
        let (inside, _) = inside.split_once('}').unwrap();
        assert!(!inside.contains(['\n', '#']), "{with}");
        assert!(!inside.trim().ends_with(','), "{with}");
    }
}

#[test]
fn settings_appended_later_keep_their_table() {
    let entries = stores().entries();
    for before in [
        "",
        "[storage]\ndriver = \"overlay\"\n",
        "[storage.options.overlay]\nmountopt = \"nodev\"\n",
    ] {
        let with = file(before).with_stores(&stores()).unwrap();
        for (below, joins) in [
            ("size = \"10G\"\n", true),
            ("\n# mine\n  size = \"10G\"\n\n[storage.options.vfs]\n", true),
            ("\n# mine\n\n[storage.options.vfs]\nsize = \"10G\"\n", false),
            ("# mine\n", false),
        ] {
            let text = format!("{with}{below}");
            let rest = file(&text).without_stores(&stores()).unwrap();
            assert!(
                !file(&rest).named_stores(&stores()).unwrap().any() && rest.ends_with(below),
                "{rest}"
            );
            let (was, is): (toml::Table, toml::Table) = (text.parse().unwrap(), rest.parse().unwrap());
            if joins {
                assert_eq!(is["storage"]["options"]["size"].as_str(), Some("10G"), "{rest}");
                let meant = |text| parsed_without(text, "", &entries).unwrap();
                assert_eq!(meant(&text), meant(&rest));
                assert_eq!(was["storage"].get("driver"), is["storage"].get("driver"));
            } else {
                assert_eq!(rest, format!("{before}{below}"));
            }
        }
    }
}

#[test]
fn manual_entry_is_corrected() {
    let text = "[storage.options]\nadditionalimagestores = [\"/var/lib/nydus-store/store/\", \"/a\"]\n\
                additionallayerstores = [\"/var/lib/nydus-store/layers\"]\n";
    assert!(!file(text).named_stores(&stores()).unwrap().any());
    let with = file(text).with_stores(&stores()).unwrap();
    assert_eq!(list(&with, IMAGE_STORES), ["/var/lib/nydus-store/store", "/a"]);
    assert_eq!(list(&with, LAYER_STORES), ["/var/lib/nydus-store/layers:ref"]);
    let rest = file(&with).without_stores(&stores()).unwrap();
    assert_eq!(list(&rest, IMAGE_STORES), ["/a"]);
}

#[test]
fn uneditable_file_is_reported_with_its_line() {
    for (text, expected) in [
        ("[storage]\ndriver = \n", "line 2"),
        ("[storage]\ndriver = \"vfs\"\n", "line 2: the storage driver is \"vfs\""),
        ("[storage]\n\ndriver = 3\n", "line 3: `storage.driver` must be a string"),
        ("storage = 1\n", "line 1: `storage` must be a table"),
        ("[storage]\noptions = 1\n", "line 2: `storage.options` must be a table"),
        (
            "[storage.options]\n# x\nadditionallayerstores = \"/a\"\n",
            "line 3: `storage.options.additionallayerstores` must be a list",
        ),
        (
            "[storage.options]\nadditionalimagestores = 1\n",
            "line 2: `storage.options.additionalimagestores` must be a list",
        ),
    ] {
        let message = file(text).with_stores(&stores()).unwrap_err().to_string();
        assert!(
            message.starts_with("storage.conf") && message.contains(expected),
            "{message}"
        );
    }
}
