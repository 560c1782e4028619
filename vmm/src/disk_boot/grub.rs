//! `grub.cfg` as far as a boot needs it: the menu, which entry is the default, and what that one starts. It is a script; here its
//! assignments and menu entries are taken in order and its conditions are not looked at.

use std::collections::BTreeMap;

use super::{Entry, expand};

/// Deepest nesting of menus.
const MAX_DEPTH: usize = 8;
/// Most entries and submenus.
const MAX_NODES: usize = 1024;

/// An entry or a submenu.
#[derive(Debug, Default)]
struct Node {
    title: String,
    id: String,
    entry: Entry,
    children: Vec<Node>,
}

/// What a brace opened.
enum Block {
    Menu(Node),
    Submenu(Node),
    Other,
}

/// The variables of a `grubenv` file.
pub fn environment(text: &str) -> BTreeMap<String, String> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    // Set for one boot only, and unset by writing the file, which nobody does here.
    let pairs = lines.filter_map(|line| line.split_once('=')).filter(|(name, _)| *name != "next_entry");
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// The default entry of a `grub.cfg`.
pub fn default_entry(text: &str, mut environment: BTreeMap<String, String>) -> Option<Entry> {
    let mut stack: Vec<Block> = Vec::new();
    let mut menu = Vec::new();
    let mut nodes = 0;
    // A backslash at its end continues a line.
    let text = text.replace("\\\n", " ");
    for line in text.lines() {
        let words = words(line, &environment);
        for words in words.split(|word| word == ";") {
            statement(words, &mut stack, &mut menu, &mut nodes, &mut environment);
        }
    }
    let wanted = environment.get("default").map_or("0", String::as_str);
    let chosen = find(&menu, wanted).or_else(|| first(&menu, 0))?;
    (!chosen.entry.linux.is_empty()).then(|| chosen.entry.clone())
}

fn statement(
    words: &[String],
    stack: &mut Vec<Block>,
    menu: &mut Vec<Node>,
    nodes: &mut usize,
    environment: &mut BTreeMap<String, String>,
) {
    let mut words = words.iter().map(String::as_str).peekable();
    while words.next_if(|word| matches!(*word, "then" | "else" | "do")).is_some() {}
    let rest: Vec<&str> = words.collect();
    match rest.as_slice() {
        ["}"] => close(stack, menu),
        [command @ ("menuentry" | "submenu"), title, options @ .., "{"] => {
            *nodes += 1;
            if *nodes > MAX_NODES || stack.len() >= MAX_DEPTH {
                return stack.push(Block::Other);
            }
            let id = options.windows(2).find(|pair| pair[0] == "--id").map_or("", |pair| pair[1]);
            let node = Node { title: (*title).to_owned(), id: id.to_owned(), ..Node::default() };
            stack.push(if *command == "submenu" { Block::Submenu(node) } else { Block::Menu(node) });
        }
        [.., "{"] if stack.len() < MAX_NODES => stack.push(Block::Other),
        ["linux" | "linux16" | "linuxefi", kernel, options @ ..] => {
            if let Some(Block::Menu(node)) = stack.last_mut() {
                node.entry.linux = (*kernel).to_owned();
                let quoted = options.iter().map(|option| match option.contains(' ') {
                    true => format!("\"{option}\""),
                    false => (*option).to_owned(),
                });
                node.entry.options = quoted.collect::<Vec<_>>().join(" ");
            }
        }
        ["initrd" | "initrd16" | "initrdefi", files @ ..] => {
            if let Some(Block::Menu(node)) = stack.last_mut() {
                node.entry.initrds = files.iter().map(|file| (*file).to_owned()).collect();
            }
        }
        ["set", assignment] | [assignment] if stack.is_empty() => {
            if let Some((name, value)) = assignment.split_once('=')
                // `set default="${saved_entry}"` where nothing was saved, and `menuentry_id_option=""` for a GRUB of long ago:
                // both are the other branch of a condition.
                && !value.is_empty()
                && environment.len() < MAX_NODES
            {
                environment.insert(name.to_owned(), value.to_owned());
            }
        }
        _ => {}
    }
}

fn close(stack: &mut Vec<Block>, menu: &mut Vec<Node>) {
    let (Some(Block::Menu(node)) | Some(Block::Submenu(node))) = stack.pop() else { return };
    let parent = stack.iter_mut().rev().find_map(|block| match block {
        Block::Submenu(node) => Some(&mut node.children),
        _ => None,
    });
    parent.unwrap_or(menu).push(node);
}

/// `0`, a title, an id, or a path of them with `>` between.
fn find<'a>(menu: &'a [Node], wanted: &str) -> Option<&'a Node> {
    let (mut nodes, mut found) = (menu, None);
    for part in wanted.split('>').map(str::trim) {
        let by_name = |node: &&Node| node.id == part || node.title == part;
        let node = match part.parse::<usize>() {
            Ok(number) => nodes.get(number),
            Err(_) => nodes.iter().find(by_name),
        }?;
        (nodes, found) = (&node.children, Some(node));
    }
    match found {
        Some(node) if node.entry.linux.is_empty() => first(&node.children, 0),
        found => found,
    }
}

/// The first entry that starts something.
fn first(menu: &[Node], depth: usize) -> Option<&Node> {
    menu.iter().find_map(|node| match node.entry.linux.is_empty() {
        false => Some(node),
        true if depth < MAX_DEPTH => first(&node.children, depth + 1),
        true => None,
    })
}

/// The words of a line by GRUB's rules of quoting, with variables replaced; `{`, `}` and `;` are words where they stand alone.
fn words(line: &str, environment: &BTreeMap<String, String>) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut rest = line.chars().peekable();
    // Variables are replaced word part by word part, so that a quoted `$` stays one.
    let mut plain = String::new();
    let end_plain = |plain: &mut String, word: &mut Option<String>| {
        if !plain.is_empty() {
            let expanded = expand(plain, environment);
            // Unquoted, what is empty after all is no word.
            if !expanded.is_empty() || word.is_some() {
                word.get_or_insert_default().push_str(&expanded);
            }
            plain.clear();
        }
    };
    while let Some(c) = rest.next() {
        match c {
            '#' if word.is_none() && plain.is_empty() => break,
            '\'' => {
                end_plain(&mut plain, &mut word);
                let word = word.get_or_insert_default();
                word.extend(rest.by_ref().take_while(|c| *c != '\''));
            }
            '"' => {
                end_plain(&mut plain, &mut word);
                let mut quoted = String::new();
                while let Some(c) = rest.next() {
                    match c {
                        '"' => break,
                        '\\' => quoted.extend(rest.next()),
                        c => quoted.push(c),
                    }
                }
                word.get_or_insert_default().push_str(&expand(&quoted, environment));
            }
            '\\' => {
                end_plain(&mut plain, &mut word);
                word.get_or_insert_default().extend(rest.next());
            }
            c if c.is_whitespace() || c == ';' => {
                end_plain(&mut plain, &mut word);
                words.extend(word.take());
                if c == ';' {
                    words.push(";".to_owned());
                }
            }
            c => plain.push(c),
        }
    }
    end_plain(&mut plain, &mut word);
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As Debian's update-grub writes it, shortened.
    const DEBIAN: &str = r#"
set default_unused=1
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="0"
fi
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi
export menuentry_id_option
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
    save_env saved_entry
  fi
}
function gfxmode {
	set gfxpayload="${1}"
}
set linux_gfx_mode=
menuentry 'Debian GNU/Linux' --class debian --class gnu-linux --class os $menuentry_id_option 'gnulinux-simple-1f' {
	load_video
	insmod gzio
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	insmod part_gpt
	search --no-floppy --fs-uuid --set=root 1f
	echo	'Loading Linux 6.12 ...'
	linux	/boot/vmlinuz-6.12 root=PARTUUID=1f ro  console=tty0 console=ttyS0,115200 name='a b'
	echo	'Loading initial ramdisk ...'
	initrd	/boot/initrd.img-6.12
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-1f' {
	menuentry 'Debian GNU/Linux, with Linux 6.12' --class debian --id 'gnulinux-6.12-advanced-1f' {
		linux	/boot/vmlinuz-6.12 root=PARTUUID=1f ro
		initrd	/boot/initrd.img-6.12
	}
	menuentry 'Debian GNU/Linux, with Linux 6.1' --class debian --id 'gnulinux-6.1-advanced-1f' {
		linux	/boot/vmlinuz-6.1 root=PARTUUID=1f ro $vt_handoff
		initrd	/boot/early.img /boot/initrd.img-6.1
	}
}
if [ -f  ${config_directory}/custom.cfg ]; then
  source ${config_directory}/custom.cfg
fi
"#;

    fn entry(text: &str, saved: &[(&str, &str)]) -> Option<Entry> {
        let saved = saved.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        default_entry(text, saved.collect())
    }

    #[test]
    fn debians_default_entry_is_found() {
        let entry = entry(DEBIAN, &[]).unwrap();
        assert_eq!(entry.linux, "/boot/vmlinuz-6.12");
        assert_eq!(entry.initrds, ["/boot/initrd.img-6.12"]);
        assert_eq!(entry.options, "root=PARTUUID=1f ro console=tty0 console=ttyS0,115200 \"name=a b\"");
    }

    #[test]
    fn a_saved_entry_is_found_by_its_path_and_one_that_is_gone_is_not_waited_for() {
        let text = DEBIAN.replace("set default=\"0\"", "set default=\"${saved_entry}\"");
        for saved in
            ["gnulinux-advanced-1f>gnulinux-6.1-advanced-1f", "1>1", "1>Debian GNU/Linux, with Linux 6.1"]
        {
            let entry = entry(&text, &[("saved_entry", saved)]).unwrap();
            assert_eq!(entry.linux, "/boot/vmlinuz-6.1", "{saved}");
            assert_eq!(entry.initrds.len(), 2);
            assert_eq!(entry.options, "root=PARTUUID=1f ro");
        }
        for saved in [&[("saved_entry", "9")][..], &[("saved_entry", "gone>1")], &[]] {
            assert_eq!(entry(&text, saved).unwrap().linux, "/boot/vmlinuz-6.12");
        }
        // A submenu alone means its first entry.
        assert_eq!(entry(&text, &[("saved_entry", "1")]).unwrap().options, "root=PARTUUID=1f ro");
    }

    #[test]
    fn the_environment_is_read_from_its_block() {
        let text = "# GRUB Environment Block\nsaved_entry=1>0\nkernelopts=root=x ro\nnext_entry=5\n######";
        let read = environment(text);
        assert_eq!(read.get("saved_entry").map(String::as_str), Some("1>0"));
        assert_eq!(read.get("kernelopts").map(String::as_str), Some("root=x ro"));
        assert_eq!(read.len(), 2);
    }

    #[test]
    fn menus_without_entries_have_no_default() {
        for text in
            ["", "menuentry 'x' {\n}\n", "submenu a {\nmenuentry b {\n}\n}\n", "linux /x\n", "}\n}\n{"]
        {
            assert_eq!(entry(text, &[]), None, "{text}");
        }
    }

    #[test]
    fn quotes_and_variables_are_taken_by_the_rules() {
        let environment = BTreeMap::from([("a".to_owned(), "one two".to_owned())]);
        let words = |line| words(line, &environment);
        assert_eq!(words("x  '$a' \"$a\" $b end # comment"), ["x", "$a", "one two", "end"]);
        assert_eq!(words(r#"a\ b "c\"d" '' e;f"#), ["a b", "c\"d", "", "e", ";", "f"]);
        assert_eq!(words("'open"), ["open"]);
    }

    proptest! {
        #[test]
        fn damaged_menus_end_without_a_panic(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<char>()), 0..20)) {
            let mut text: Vec<char> = DEBIAN.chars().collect();
            for (at, value) in changes {
                let at = at.index(text.len());
                text[at] = value;
            }
            let _ = entry(&text.into_iter().collect::<String>(), &[]);
        }

        #[test]
        fn any_text_ends_without_a_panic(text in "[a-z{}'\"$\\\\;>=\n ]{0,300}") {
            let _ = entry(&text, &[]);
        }
    }
}
