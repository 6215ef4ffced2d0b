//! What a guest has promised about its files, and whether it is kept.

use std::collections::BTreeMap;

/// What stands for the sum of a file that is absent, and of one that is being overwritten.
const ABSENT: &str = "-";
const ANY: &str = "any";

/// Everything that was said about files, in every boot so far.
#[derive(Debug, Default)]
pub(crate) struct Promises {
    /// The sums that a file may have. The first is promised, the others were announced since.
    files: BTreeMap<String, Vec<String>>,
    /// How many promises there were.
    pub(crate) given: usize,
    /// Everything that was said, for whoever has to find out why something is wrong.
    said: Vec<String>,
}

impl Promises {
    /// Takes a line of the guest; other lines are none of its business.
    pub(crate) fn hear(&mut self, line: &str) {
        self.said.push(line.to_owned());
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["will", name, sum] => {
                let sums = self.files.entry(name.to_owned()).or_insert_with(|| vec![ABSENT.to_owned()]);
                sums.push(sum.to_owned());
            }
            ["done", name, sum] => {
                self.files.insert(name.to_owned(), vec![sum.to_owned()]);
                self.given += 1;
            }
            _ => {}
        }
    }

    /// Notes what happens between two lines of the guest.
    pub(crate) fn note(&mut self, what: &str) {
        self.said.push(format!("-- {what}"));
    }

    /// What was said of a file and what happened between, and the last lines of all.
    fn history(&self, name: &str) -> String {
        let of_it = self.said.iter().filter(|line| line.starts_with("--") || line.split(' ').nth(1) == Some(name));
        let last = self.said.iter().skip(self.said.len().saturating_sub(20));
        let join = |lines: Vec<&String>| lines.into_iter().map(|line| format!("\n      {line}")).collect::<String>();
        format!("{}\n    the last lines:{}", join(of_it.collect()), join(last.collect()))
    }

    /// Compares with the files that are there; gives what is wrong, in words.
    pub(crate) fn judge(&self, found: &BTreeMap<String, String>) -> Vec<String> {
        let strangers = found.keys().filter(|name| !self.files.contains_key(*name));
        let mut wrong: Vec<String> = strangers.map(|name| format!("{name} was never announced")).collect();
        for (name, sums) in &self.files {
            let sum = found.get(name).map_or(ABSENT, String::as_str);
            if !sums.iter().any(|may| may == sum || may == ANY) {
                let history = self.history(name);
                wrong.push(format!("{name} has {sum}, promised and announced were {sums:?}; what was said:{history}"));
            }
        }
        wrong
    }
}
