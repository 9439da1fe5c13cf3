//! The classes of a data set, and how they relate to those of a classifier.

use crate::data::{Dataset, Splits};
use crate::error::Error;

/// The names of the classes of a data set to learn from; numbers where they have none.
///
/// # Errors
/// [`Error::Labels`] if pictures have no labels, or there are no two classes, or one has no picture to learn from.
pub(super) fn check(splits: &Splits) -> Result<Vec<String>, Error> {
    let wrong = |dataset: &Dataset, expected: &str, found: String, advice: &str| {
        Err(Error::Labels {
            data: dataset.describe(),
            reason: format!("expected {expected}, found {found}; {advice}"),
        })
    };
    for dataset in [&splits.train, &splits.held_out] {
        let without = (0..dataset.len()).find(|&i| dataset.label(i).is_none());
        if let Some(i) = without {
            let found = format!("none for {}", dataset.name(i));
            let advice = "put the pictures in a folder for each class, or add the labels' IDX file";
            return wrong(dataset, "a label for each picture", found, advice);
        }
    }
    let train = &splits.train;
    let names = names(train);
    if names.len() < 2 {
        let found = format!("{} ({})", names.len(), names.join(", "));
        let advice = "add pictures of another class";
        return wrong(train, "at least 2 classes", found, advice);
    }
    let mut counts = vec![0_usize; names.len()];
    for label in (0..train.len()).filter_map(|i| train.label(i)) {
        counts[label as usize] += 1;
    }
    if let Some(empty) = counts.iter().position(|&count| count == 0) {
        let expected = format!("pictures of each of {} classes to learn from", names.len());
        let found = format!("none of class {:?}", names[empty]);
        let advice = "add some, or remove the class";
        return wrong(train, &expected, found, advice);
    }
    Ok(names)
}

/// The names of the classes; numbers where they have none.
fn names(dataset: &Dataset) -> Vec<String> {
    let count = dataset.num_classes() as u32;
    (0..count)
        .map(|label| {
            let name = dataset.class_name(label).map(str::to_owned);
            name.unwrap_or_else(|| label.to_string())
        })
        .collect()
}

/// For each class of `dataset` its number among a classifier's `classes`: by name, or by number where one of them has numbers for
/// names and there are as many of either.
///
/// # Errors
/// [`Error::Labels`] if pictures have no labels, the classifier does not know a class, or there are others in number.
pub(crate) fn map(dataset: &Dataset, classes: &[String]) -> Result<Vec<u32>, Error> {
    let wrong = |expected: String, found: String, advice: &str| {
        Err(Error::Labels {
            data: dataset.describe(),
            reason: format!("expected {expected}, found {found}; {advice}"),
        })
    };
    if let Some(i) = (0..dataset.len()).find(|&i| dataset.label(i).is_none()) {
        let found = format!("none for {}", dataset.name(i));
        let advice = "put the pictures in a folder for each class, or add the labels' IDX file";
        return wrong("a label for each picture".to_owned(), found, advice);
    }
    let names = names(dataset);
    let numbers = |names: &[String]| {
        names
            .iter()
            .enumerate()
            .all(|(i, name)| *name == i.to_string())
    };
    let is_known = |name: &String| classes.contains(name);
    if !names.iter().all(is_known) && (numbers(&names) || numbers(classes)) {
        if names.len() != classes.len() {
            let (expected, found) = (
                format!("{} classes, as the classifier has", classes.len()),
                format!("{} ({})", names.len(), short(&names)),
            );
            let advice = "give the data that it was fine-tuned for";
            return wrong(expected, found, advice);
        }
        return Ok((0..names.len() as u32).collect());
    }
    let mut mapped = Vec::new();
    for name in names {
        let Some(class) = classes.iter().position(|class| *class == name) else {
            let expected = format!("classes that the classifier has ({})", short(classes));
            let advice = "give the data that it was fine-tuned for, or remove the class";
            return wrong(expected, format!("{name:?}"), advice);
        };
        mapped.push(class as u32);
    }
    Ok(mapped)
}

/// A few of the names.
fn short(classes: &[String]) -> String {
    const SHOWN: usize = 10;
    let more = if classes.len() > SHOWN { ", …" } else { "" };
    format!("{}{more}", classes[..classes.len().min(SHOWN)].join(", "))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data;

    fn folders(root: &Path, names: &[&str]) -> Splits {
        for name in names {
            std::fs::create_dir_all(root.join(name)).unwrap();
            for i in 0..2 {
                std::fs::write(root.join(name).join(format!("{i}.png")), "").unwrap();
            }
        }
        data::open(Some(root), None).unwrap()
    }

    /// Numbers stand for names only where there are as many of either.
    #[test]
    fn by_name_else_by_number() {
        type Names = &'static [&'static str];
        let texts =
            |names: Names| -> Vec<String> { names.iter().map(|&name| name.to_owned()).collect() };
        let named: Names = &["cat", "cow", "dog"];
        let cases: [(Names, Names, Option<&[u32]>); 8] = [
            (&["cow", "dog"], named, Some(&[1, 2])),
            (&["0", "2"], &["0", "1", "2"], Some(&[0, 2])),
            (named, &["0", "1", "2"], Some(&[0, 1, 2])),
            (&["0", "1", "2"], named, Some(&[0, 1, 2])),
            (&["0", "1"], named, None),
            (&["cow", "dog"], &["0", "1", "2"], None),
            (&["0", "1", "2", "3"], &["0", "1", "2"], None),
            (&["cow", "owl"], named, None),
        ];
        for (names, classes, want) in cases {
            let folder = tempfile::tempdir().unwrap();
            let splits = folders(folder.path(), names);
            let found = map(&splits.held_out, &texts(classes));
            match want {
                Some(want) => assert_eq!(found.unwrap(), want, "{names:?} {classes:?}"),
                None => {
                    let error = found.unwrap_err().to_string();
                    assert!(error.contains("expected"), "{names:?} {classes:?}: {error}");
                }
            }
        }
    }
}
